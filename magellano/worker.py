"""The child process in which a stage trains: `python -m magellano.worker FD`, started by magellano.isolation.

Standard input: one line of JSON, the request; then it stays open as long as the parent lives. FD takes the messages, a
JSON object a line: {"progress": [done, total, facts]}, {"log": [logger, level, text]}, and last {"result": facts} or
{"error": ...}.
"""

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from magellano.cli import exit_code
from magellano.errors import ExitCode, OutOfMemory
from magellano.names import Stage

PATIENCE = 120.0  # seconds that a child whose parent is gone has for its step and its checkpoint
FAULT = "MAGELLANO_FAULT"  # for tests alone, see `_test_fault`
_OOM_SCORE = Path("/proc/self/oom_score_adj")


class Channel:
    """The messages' way to the parent. One that is gone is no reason to fail: the checkpoint is still to be written."""

    def __init__(self, fd: int) -> None:
        self._fd, self._lock = fd, threading.Lock()

    def __call__(self, **message: Any) -> None:
        data = json.dumps(message).encode() + b"\n"
        with self._lock:
            try:
                while data:
                    data = data[os.write(self._fd, data) :]
            except BrokenPipeError:
                return


class Handler(logging.Handler):
    """Log records go to the parent, which logs them under the same name."""

    def __init__(self, channel: Channel) -> None:
        super().__init__()
        self._channel = channel

    def emit(self, record: logging.LogRecord) -> None:
        self._channel(log=[record.name, record.levelno, record.getMessage()])


def main() -> NoReturn:
    """Carry out the request on standard input; exits at once after, past whatever a GPU's driver does at its end."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until training begins there is nothing to finish
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    channel = Channel(int(sys.argv[1]))
    with open(0, "rb", buffering=0, closefd=False) as stdin:
        request = json.loads(stdin.readline())
    threading.Thread(target=_end_with_the_parent, daemon=True).start()
    _be_the_first_to_go()
    logger = logging.getLogger("magellano")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(Handler(channel))
    code = ExitCode.DONE
    try:
        channel(result=_carry_out(request, channel))
    except BaseException as error:
        found = exit_code(error)
        told = {"type": type(error).__name__, "args": _plain(error), "text": str(error), "traceback": ""}
        if found is None:
            told["traceback"] = traceback.format_exc()
        channel(error=told)
        code = found or ExitCode.FAILED
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _carry_out(request: dict[str, Any], channel: Channel) -> dict[str, Any]:
    from magellano.profile import Profile

    profile = Profile.model_validate(request["profile"])

    def progress(done: int, total: int, **facts: float | str) -> None:
        channel(progress=[done, total, facts])
        if FAULT in os.environ:
            _test_fault(os.environ[FAULT], done, request["attempt"])

    out, work = Path(request["out"]), Path(request["work"])
    folders = [Path(folder) for folder in request["folders"]]
    match Stage(request["stage"]):
        case Stage.TRAIN:
            from magellano.stages import train

            tokens, base, adapter = folders
            return train.run(out, profile, tokens, base, adapter, work, progress)
        case Stage.PRETRAIN:
            from magellano.stages import pretrain

            (tokens,) = folders
            return pretrain.run(out, profile, tokens, work, progress)
        case other:
            raise AssertionError(f"{other} does not train")


def _plain(error: BaseException) -> list[Any]:
    """What the exception can be made of again."""
    return [a if a is None or isinstance(a, int | str) else str(a) for a in error.args]


def _end_with_the_parent() -> None:
    """Once standard input ends the parent is gone: stop as on a signal, the state saved, but within bounds."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(PATIENCE)
    os._exit(ExitCode.RESUMABLE)


def _be_the_first_to_go() -> None:
    """Where memory runs out the kernel shall kill this process and not its parent, which goes on with less."""
    if _OOM_SCORE.exists():
        _OOM_SCORE.write_text("500", encoding="ascii")


def _test_fault(spec: str, step: int, attempt: int) -> None:
    """`KIND@STEP[#ATTEMPT][,...]`: fail so after that step (`*`: each), before its checkpoint; in every attempt, or in
    that one.
    """
    for fault in spec.split(","):
        kind, _, where = fault.partition("@")
        at, _, only = where.partition("#")
        if at not in ("*", str(step)) or (only and int(only) != attempt):
            continue
        match kind:
            case "memory":
                raise OutOfMemory("a fault of the test")
            case "mlx":
                raise RuntimeError("[metal::malloc] Unable to allocate 17179869184 bytes.")
            case "metal":
                _abort("Insufficient Memory (00000008:kIOGPUCommandBufferCallbackErrorOutOfMemory)")
            case "gpu":
                _abort("Caused GPU Hang Error (00000003:kIOGPUCommandBufferCallbackErrorHang)")
            case "abort":
                os.abort()
            case "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            case "bug":
                raise KeyError("a bug of the test")
            case "sleep":
                time.sleep(0.5)
            case _:
                raise AssertionError(f"{FAULT}: unknown fault {kind!r}")


def _abort(metal: str) -> NoReturn:
    """As MLX ends where a Metal command buffer fails."""
    said = "libc++abi: terminating due to uncaught exception of type std::runtime_error: [METAL] Command buffer "
    sys.stderr.write(f"{said}execution failed: {metal}\n")
    os.abort()


if __name__ == "__main__":
    main()
