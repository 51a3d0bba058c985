"""Training in a child process, so that what kills a process (out of memory on Metal, a GPU fault, the kernel) does not
end the run: out of memory is answered with smaller micro-batches and as many more of them, which is the same gradient;
anything else with one more try; both continue from the last checkpoint.

Nothing but JSON passes between the two. The child ends with its parent, and holds the artifact's lock until then.
"""

import builtins
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import FrameType
from typing import IO, Any

from magellano import durable, errors, faults, files
from magellano.errors import Aborted, InputError, OutOfMemory, Stopped
from magellano.info import cache_root
from magellano.names import Fault, Stage
from magellano.profile import Profile, TrainConfig
from magellano.progress import Progress
from magellano.signals import StopRequest, end_process

log = logging.getLogger(__name__)

RECORD = "faults.json"  # in the work folder: what was survived so far, so that the next start does not try it again
MLX_KERNELS = "MLX_PTX_CACHE_DIR"  # where MLX's CUDA build keeps what it compiles; by default in the system's /tmp
PATIENCE = 20.0  # seconds to save in where this process must end; Prefect kills 30 s after it cancels
TAIL = 200  # of the child's last lines that tell what it died of
_ROOT = str(Path(__file__).resolve().parent.parent)


def run(
    stage: Stage, out: Path, profile: Profile, folders: list[Path], work: Path, progress: Progress,
    lock: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The facts of magellano.stages.<stage>.run(out, profile, *folders, work, progress), carried out in a child
    process; after faults also `faults`, what they were, and the `batch` and `accumulate` that it ended with.

    `lock`: a descriptor that the child inherits. Raises what the stage raises; OutOfMemory where not even micro-batches
    of 1 fit, Aborted where the child died twice of something else.
    """
    durable.private_folder(work)
    asked, survived, retried = _section(stage, profile), _Survived(work / RECORD), False
    with _Signals() as signals:
        for attempt in itertools.count(1):
            batch, accumulate = survived.sizes or (asked.batch, asked.accumulate)
            request = {
                "stage": stage, "profile": _with_sizes(stage, profile, batch, accumulate).model_dump(mode="json"),
                "out": str(out), "folders": [str(f) for f in folders], "work": str(work), "attempt": attempt,
            }  # fmt: skip
            end = _Child(request, lock, signals).follow(progress)
            if signals.requested:
                raise Stopped(f"{stage}: stopped at step {end.step}; the next start continues from the last checkpoint")
            if end.facts is not None:
                return end.facts | survived.facts(batch, accumulate)
            then = _next_sizes(stage, end, batch, accumulate, retried)
            survived.add(end, batch, accumulate, then)
            if end.fault is not Fault.MEMORY:
                retried = True
                _forget_kernels()
            _empty(out)
    raise AssertionError("never reached")


def _next_sizes(stage: Stage, end: "_End", batch: int, accumulate: int, retried: bool) -> tuple[int, int]:
    """The (batch, accumulate) to go on with after a fault; raises where there is no going on."""
    what = f"{stage}: {end.fault} after step {end.step} ({end.told})"
    if end.fault is not Fault.MEMORY:
        if retried:
            raise Aborted(f"{what}, for the second time; the checkpoints are kept, the next start continues")
        log.warning("%s: on from the last checkpoint, once", what)
        return batch, accumulate
    smaller = _smaller(batch, accumulate)
    if smaller is None:
        raise OutOfMemory(f"{what}, with micro-batches of 1; lower data.seq_len or free memory")
    log.warning(
        "%s: on from the last checkpoint with micro-batches of %d instead of %d, %d of them a step: the same gradient",
        what, smaller[0], batch, smaller[1],
    )  # fmt: skip
    return smaller


def _section(stage: Stage, profile: Profile) -> TrainConfig:
    if stage is Stage.TRAIN:
        return profile.train
    assert profile.pretrain is not None
    return profile.pretrain.train


def _with_sizes(stage: Stage, profile: Profile, batch: int, accumulate: int) -> Profile:
    train = _section(stage, profile).model_copy(update={"batch": batch, "accumulate": accumulate})
    if stage is Stage.TRAIN:
        return profile.model_copy(update={"train": train})
    assert profile.pretrain is not None
    return profile.model_copy(update={"pretrain": profile.pretrain.model_copy(update={"train": train})})


def _smaller(batch: int, accumulate: int) -> tuple[int, int] | None:
    """Half the rows at once and twice as often; a third, a fifth ... where they are odd. None: there is one row."""
    divisor = next((d for d in range(2, batch + 1) if batch % d == 0), None)
    return None if divisor is None else (batch // divisor, accumulate * divisor)


def _kernels() -> Path:
    return Path(os.environ.get(MLX_KERNELS) or cache_root() / "mlx" / version("mlx"))


def _forget_kernels() -> None:
    """MLX writes them in place and reads them unchecked: one that a kill cut off would fail each start from then on."""
    for path in _kernels().glob("*"):
        if path.suffix in (".ptx", ".txt", ".cu"):
            path.unlink(missing_ok=True)  # another process may have thought so too


def _empty(out: Path) -> None:
    """Remove what a child that died left in the stage's folder."""
    for path in sorted(out.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


class _Survived:
    """The faults of this training, also those of starts before."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._list: list[dict[str, Any]] = []
        if os.path.lexists(path):
            try:
                self._list = list(files.read_json(path, "remove it to begin with the profile's batch")["faults"])
                assert all(isinstance(fault["then"], list) for fault in self._list)
            except (InputError, KeyError, TypeError, AssertionError) as e:
                log.warning("%s is not readable (%s): beginning with the profile's batch", path, files.told(e))
                self._list = []

    @property
    def sizes(self) -> tuple[int, int] | None:
        """(batch, accumulate) to go on with; None: as the profile says."""
        if not self._list:
            return None
        batch, accumulate = self._list[-1]["then"]
        return int(batch), int(accumulate)

    def add(self, end: "_End", batch: int, accumulate: int, then: tuple[int, int]) -> None:
        fault = {"fault": end.fault, "after_step": end.step, "told": end.told}
        self._list.append({**fault, "batch": batch, "accumulate": accumulate, "then": list(then)})
        durable.write_text(self._path, json.dumps({"faults": self._list}, indent=2) + "\n")

    def facts(self, batch: int, accumulate: int) -> dict[str, Any]:
        return {"faults": self._list, "batch": batch, "accumulate": accumulate} if self._list else {}


@dataclass
class _End:
    """How a child ended: with facts, or by a fault."""

    step: int
    facts: dict[str, Any] | None = None
    fault: Fault | None = None
    told: str = ""


class _Signals(StopRequest):
    """SIGTERM and SIGINT are handed on to the child, once; it saves and ends."""

    process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "_Signals":
        super().__enter__()
        for number in self._former:
            signal.siginterrupt(number, True)  # this process waits in a read: the handler must not wait for its end
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        first, self.requested = not self.requested, True
        if first and self.process is not None:
            self.process.send_signal(signal.SIGTERM)

    def watch(self, process: subprocess.Popen[bytes]) -> None:
        """From now on the signals go to this child; one that came before goes at once."""
        self.process = process
        if self.requested:
            process.send_signal(signal.SIGTERM)


class _Child:
    """One child process, from its start to its end."""

    def __init__(self, request: dict[str, Any], lock: int | None, signals: _Signals) -> None:
        _give_memory_back()
        self._kills = faults.kernel_kills()
        reading, writing = os.pipe()
        paths = [_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-u", "-m", "magellano.worker", str(writing)],  # -P: no module of the cwd
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                pass_fds=[writing] if lock is None else [writing, lock],
                env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), MLX_KERNELS: str(_kernels())},
            )  # fmt: skip
        finally:
            os.close(writing)
        self._messages: IO[bytes] = os.fdopen(reading, "rb")
        self._step, self._tail = 0, deque[str](maxlen=TAIL)
        self._echo = threading.Thread(target=self._pass_on, daemon=True)
        self._echo.start()
        signals.watch(self._process)
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:  # it died at once: `follow` says of what
            return

    def follow(self, progress: Progress) -> _End:
        """Pass its news on until it ends. Raises what it raised, faults of memory or GPU apart."""
        last: dict[str, Any] = {}
        try:
            for line in self._messages:
                if not line.endswith(b"\n"):
                    break  # cut off by its death
                message = json.loads(line)
                if "progress" in message:
                    self._step, total, facts = message["progress"]
                    progress(self._step, total, **facts)
                elif "log" in message:
                    name, level, text = message["log"]
                    logging.getLogger(name).log(level, "%s", text)
                else:
                    last = message
            code = self._process.wait()
        finally:
            self._end()
            self._echo.join(10)
            self._messages.close()
            _close(self._process.stdin)
        if "result" in last:
            return _End(self._step, facts=last["result"])
        return self._of_error(last["error"]) if "error" in last else self._of_death(code)

    def _end(self) -> None:
        """Where following was broken off: as on a signal, but bounded."""
        if self._process.poll() is None:
            end_process(self._process, PATIENCE)

    def _of_error(self, error: dict[str, Any]) -> _End:
        text = " ".join(error["text"].split()) or error["type"]
        if error["type"] in ("OutOfMemory", "MemoryError"):
            return _End(self._step, fault=Fault.MEMORY, told=text)
        if error["type"] == "RuntimeError" and (fault := faults.of_text(text)):
            return _End(self._step, fault=fault, told=text)
        raise _again(error)

    def _of_death(self, code: int) -> _End:
        if -code in (signal.SIGTERM, signal.SIGINT):
            raise Stopped(
                f"stopped by a signal at step {self._step}; the next start continues from the last checkpoint"
            )
        kills = faults.kernel_kills()
        killed = None if kills is None or self._kills is None else kills > self._kills
        fault, told = faults.of_exit(code, "".join(self._tail), killed)
        return _End(self._step, fault=fault, told=told)

    def _pass_on(self) -> None:
        """What the child prints goes to standard error, and its last lines are kept."""
        assert self._process.stdout
        with self._process.stdout as lines:
            for line in lines:
                text = line.decode(errors="replace")
                self._tail.append(text)
                sys.stderr.write(text)


def _again(error: dict[str, Any]) -> Exception:
    """The exception that the child told of, with its traceback as a note where it is a bug."""
    kind = getattr(errors, error["type"], None) or getattr(builtins, error["type"], None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        made = kind(*error["args"])
    else:
        made = RuntimeError(f"{error['type']}: {error['text']}")
    if error["traceback"]:
        made.add_note("in the process that trains:\n" + error["traceback"])
    return made


def _give_memory_back() -> None:
    """What MLX keeps in this process for later would be missing in the child."""
    if "magellano.backend" in sys.modules:
        from magellano.backend import mx

        mx.clear_cache()


def _close(pipe: IO[bytes] | None) -> None:
    if pipe is not None:
        try:
            pipe.close()
        except BrokenPipeError:  # what it did not read any more
            return
