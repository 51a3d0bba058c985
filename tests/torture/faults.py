"""An error at every write, fsync and rename of one save and of one publish, once and for good; files that may not grow;
a disk that is full. What was there stays whole, what is new is whole or not there, and the error is told.
"""

import ctypes
import os
import re
import resource
import shutil
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from magellano import durable, state
from magellano.artifacts import MANIFEST, Store
from magellano.backend import mx
from magellano.names import Stage
from tests.torture import rig
from tests.torture.outcome import Row, Share

CALLS = ("write", "writev", "pwrite64", "fsync", "fdatasync", "rename", "renameat", "renameat2", "mkdir", "mkdirat",
         "chmod", "fchmod", "fchmodat", "unlink", "unlinkat", "rmdir", "ftruncate")  # fmt: skip
ERRORS = ("ENOSPC", "EIO")
LEVEL = "{}, in a fork under strace"
KEY, OTHER = "k" * 32, "o" * 32
WAY_OUT = ("OSError", "DiskFull", "RuntimeError: ")  # MLX tells a failed write as a RuntimeError


def part(share: Share) -> Iterator[Row]:
    for subject in (Save(), Publish(), Rerun()):
        yield from injected(subject, share)
    for subject in (Save(), Publish()):
        yield limited(subject, share)
        yield full(subject, share)
    yield full(Stopped(), share)


class Subject:
    """Something written: `prepare` makes what is there before, `act` writes more, `after` says what is wrong then."""

    name = ""

    def prepare(self, folder: Path) -> None:
        raise NotImplementedError

    def act(self, folder: Path) -> None:
        raise NotImplementedError

    def after(self, folder: Path, done: bool) -> str:
        """Why what is there now is wrong; `done`: `act` returned. Runs in a child of its own."""
        raise NotImplementedError


class Save(Subject):
    """Checkpoints 1 and 2 are there, the third is written, which makes the first go."""

    name = "state.save"

    @staticmethod
    def arrays(step: int) -> dict[str, mx.array]:
        return {f"w{n}": mx.arange(10000 + n) + step for n in range(2)}

    def prepare(self, folder: Path) -> None:
        for step in (1, 2):
            state.save(folder, step, self.arrays(step), self.arrays(-step), {"step": step})

    def act(self, folder: Path) -> None:
        state.save(folder, 3, self.arrays(3), self.arrays(-3), {"step": 3})

    def after(self, folder: Path, done: bool) -> str:
        for path in sorted(folder.glob("step-*"))[-2:]:
            if why := durable.damage(path, state.SEAL):
                return f"{path.name}: {why}"
        found = state.latest(folder)
        if found is None or found.facts["step"] not in ({3} if done else {2, 3}):
            return f"step {found and found.facts['step']} is the latest, done {done}"
        step = found.facts["step"]
        for read, wanted in ((found.parameters, self.arrays(step)), (found.optimizer, self.arrays(-step))):
            if any(not np.array_equal(np.array(read[n]), np.array(a)) for n, a in wanted.items()):
                return f"step {step} reads back otherwise"
        state.save(folder, 4, self.arrays(4), self.arrays(-4), {"step": 4})
        return "" if (found := state.latest(folder)) and found.facts["step"] == 4 else "the next save is not the latest"


class Publish(Subject):
    """One artifact is there, another is built."""

    name = "Store.build"
    key, before, rerun = OTHER, "", ""

    def __init__(self) -> None:
        self.calls = 0

    def _build(self, folder: Path, key: str, text: str, rerun: str = "") -> str:
        def make(out: Path) -> dict[str, object]:
            self.calls += 1
            (out / "deep").mkdir()
            (out / "deep" / "text").write_text(text * 1000)
            mx.save_safetensors(str(out / "w.safetensors"), {"w": mx.arange(20000)})
            return {"text": text}

        store = Store(folder)
        built = store.build(Stage.QUANTIZE, key, version=1, inputs={}, config={}, make=make, rerun=rerun)
        return (store.path(built.ref) / "deep" / "text").read_text()[: len(text)]

    def prepare(self, folder: Path) -> None:
        self._build(folder, KEY, "old")

    def act(self, folder: Path) -> None:
        self._build(folder, self.key, "new", self.rerun)

    def after(self, folder: Path, done: bool) -> str:
        names = {p.name for p in (folder / "artifacts" / Stage.QUANTIZE).iterdir() if not p.name.startswith(".")}
        for name in names:
            if why := durable.damage(folder / "artifacts" / Stage.QUANTIZE / name, MANIFEST):
                return f"{name[:1]}: {why}"
        if done and self.key not in names:
            return "the build returned and its artifact is not there"
        self.calls = 0
        if self._build(folder, KEY, "old") not in {"old", "new" if self.key == KEY else "old"} or self.calls:
            return "the old artifact had to be built again"
        if self._build(folder, self.key, "new", self.rerun) != "new" or self.calls > 1:
            return "the next build does not give the new artifact"
        left = [p.name for p in (folder / "artifacts" / Stage.QUANTIZE).iterdir() if p.name.startswith(".")]
        return f"left: {left}" if left else ""


class Rerun(Publish):
    """One artifact is there and is built anew in its place."""

    name = "Store.build, a rerun"
    key, rerun = KEY, "again"


class Stopped(Publish):
    """A stage that saves checkpoints in its work folder: what a person is told where they do not fit."""

    name = "a stage's checkpoints in Store.build"

    def act(self, folder: Path) -> None:
        store = Store(folder)

        def make(out: Path) -> dict[str, object]:
            (out / "deep").mkdir()
            (out / "deep" / "text").write_text("new" * 1000)
            work = store.work(Stage.QUANTIZE, OTHER)
            for step in range(1, 5):
                state.save(work, step, Save.arrays(step), Save.arrays(-step), {"step": step})
            return {}

        try:
            store.build(Stage.QUANTIZE, OTHER, version=1, inputs={}, config={}, make=make)
        finally:
            found = sorted((folder / "work" / Stage.QUANTIZE / OTHER).glob("step-*"))
            assert not any(durable.damage(path, state.SEAL) for path in found), "a checkpoint is not whole"


def attempt(
    subject: Subject, folder: Path, marks: rig.Marks, limit: Callable[[], object] = lambda: None, *strace: str
) -> tuple[str, str]:
    """(what `act` ended with: "done" or the exception, what is wrong afterwards). `strace`: its arguments, if any."""
    shutil.rmtree(folder, ignore_errors=True)
    tracer = None

    def act() -> str:
        subject.prepare(folder)
        marks.stage = 0
        if strace:
            ctypes.CDLL(None).prctl(0x59616D61, -1, 0, 0, 0)  # whoever may trace us
            while "TracerPid:\t0\n" in Path("/proc/self/status").read_text():
                time.sleep(0.001)
        limit()
        subject.act(folder)
        return "done"

    marks.clear()
    pid = rig.fork(act, marks)
    if strace:
        while marks.stage != 0 and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.0005)
        tracer = subprocess.Popen(["strace", "-f", "-qq", "-p", str(pid), *strace], stderr=subprocess.DEVNULL)
    status = rig.wait(pid)
    if tracer:
        tracer.wait(30)
    if status not in (0, 1):
        return f"ended with {status}", f"ended with {status}"
    told, done = marks.words, status == 0
    if not done and not told.startswith(WAY_OUT):
        return told, f"an unexpected error: {told[:1500]}"
    marks.clear()
    if rig.wait(rig.fork(lambda: subject.after(folder, done), marks)) != 0:
        return told, f"after {told.splitlines()[0]!r}: {marks.words[:1500]}"
    return told, marks.words and f"after {told.splitlines()[0]!r}: {marks.words}"


def injected(subject: Subject, share: Share) -> Iterator[Row]:
    """Each call that writes fails once, and from there on for good."""
    rows = [
        Row(f"an error at each write, fsync, rename, {how}", LEVEL.format(subject.name)) for how in ("once", "for good")
    ]
    if not shutil.which("strace"):
        for row in rows:
            row.skipped = "strace is not there"
            yield row
        return
    with tempfile.TemporaryDirectory() as name:
        folder, log, marks = Path(name, "home"), Path(name, "log"), rig.Marks()
        trace = ("-e", "trace=" + ",".join(CALLS))
        told, wrong = attempt(subject, folder, marks, lambda: None, "-o", str(log), *trace)
        assert told == "done", (told, wrong)
        counts = Counter(line.split(None, 1)[1].split("(")[0] for line in log.read_text().splitlines() if "(" in line)
        faults = [(call, n, e) for call, count in counts.items() for n in range(1, count + 1) for e in ERRORS]
        for row, plus in zip(rows, ("", "+"), strict=True):
            told_as = Counter[str]()
            for call, n, error in share.spread(faults, 12):
                inject = ("-e", f"inject={call}:error={error}:when={n}{plus}")
                told, wrong = attempt(subject, folder, marks, lambda: None, "-o", str(log), *trace, *inject)
                if "(INJECTED)" not in log.read_text():
                    wrong = wrong or f"strace injected nothing at {call} {n}"
                row.tries += 1
                told_as[told.split(":")[0]] += 1
                row.check(not wrong, f"{call} number {n}{plus}, {error}: {wrong}")
            calls = ", ".join(f"{call} {count}" for call, count in sorted(counts.items()))
            row.note = f"calls: {calls}; ended as: {', '.join(f'{k} {v}' for k, v in sorted(told_as.items()))}"
            yield row


def size_of(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())


def limited(subject: Subject, share: Share) -> Row:
    """No file may grow beyond a size (RLIMIT_FSIZE): writes that cross it are cut short, as on a full disk."""
    row = Row("files may not grow beyond a size", f"{subject.name}, in a fork")
    told_as = Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        folder, marks = Path(name, "home"), rig.Marks()
        attempt(subject, folder, marks)
        largest = max(p.stat().st_size for p in folder.rglob("*") if p.is_file())
        for size in share.spread([round(largest * n / 40) for n in range(40)], 4):
            limit = lambda size=size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))  # noqa: E731
            told, wrong = attempt(subject, folder, marks, limit)
            row.tries += 1
            told_as[told.split(":")[0]] += 1
            row.check(not wrong, f"{size} bytes: {wrong}")
            row.check(told != "done", f"{size} bytes: nothing failed")
    row.note = f"ended as: {', '.join(f'{k} {v}' for k, v in sorted(told_as.items()))}"
    return row


def full(subject: Subject, share: Share) -> Row:
    """A small tmpfs with fewer pages free than are needed: 0, 1, 2, ... of them."""
    row = Row("a full disk", f"{subject.name}, in a fork, on a tmpfs")
    with tempfile.TemporaryDirectory() as name:
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", name], capture_output=True).returncode:
            row.skipped = "may not mount a tmpfs"
            return row
        try:
            folder, filler, marks = Path(name, "home"), Path(name, "filler"), rig.Marks()
            attempt(subject, folder, marks)
            pages = size_of(folder) // 4096 + 8
            told_as = Counter[str]()
            for left in share.spread(list(range(pages)), 4):
                filler.unlink(missing_ok=True)

                def fill(left: int = left) -> None:
                    free = shutil.disk_usage(name).free
                    filler.write_bytes(bytes(max(0, free - 4096 * left)))

                told, wrong = attempt(_Emptied(subject, filler), folder, marks, fill)
                row.tries += 1
                told_as[told.split(":")[0]] += 1
                row.check(not wrong, f"{left} pages free: {wrong}")
                if isinstance(subject, Save | Stopped) and left > 2 and told != "done":
                    clear = re.match(r"DiskFull: .*the disk is full: at least [\d,]+ bytes are needed and", told)
                    row.check(clear, f"{left} pages free: not told clearly: {told[:300]}")
        finally:
            subprocess.run(["umount", name], check=True)
    row.check(len(told_as) > 1, f"all ended alike: {told_as}")
    row.note = f"ended as: {', '.join(f'{k} {v}' for k, v in sorted(told_as.items()))}"
    return row


class _Emptied(Subject):
    """As the subject; what is checked afterwards is checked with space again."""

    def __init__(self, subject: Subject, filler: Path) -> None:
        self.prepare, self.act, self.filler, self._after = subject.prepare, subject.act, filler, subject.after  # type: ignore[method-assign]

    def after(self, folder: Path, done: bool) -> str:
        self.filler.unlink()
        return self._after(folder, done)
