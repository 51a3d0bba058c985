"""SIGKILL at random moments over all stages, many of them inside a save; each next start continues to the same bits."""

import os
import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from magellano.names import Stage
from tests.torture import rig
from tests.torture.outcome import Row, Share

LEVEL = "stages and store, in a fork"
KILLS, IN_SAVE = 700, 320
WEIGHTS = {Stage.PRETRAIN: 3, Stage.TRAIN: 6}  # where there is more to lose
POLL, SAVE = 0.0002, 0.006  # seconds


def part(share: Share) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder, marks = Path(name), rig.Marks()
        victim = Victim(folder, rig.uninterrupted(folder, marks), marks, random.Random(share.seed))
        yield victim.kills("SIGKILL in each stage, at random", share.of(KILLS, 12), victim.in_a_stage)
        inside = "SIGKILL inside a checkpoint's save"
        yield victim.kills(inside, share.of(IN_SAVE, 6), victim.in_a_save, Stage.CHECKPOINT, lambda: marks.writing == 1)
        yield victim.signals(share.of(40, 3))


class Victim:
    """A home whose chain is killed again and again until it ends; then a new home."""

    def __init__(self, folder: Path, reference: rig.Reference, marks: rig.Marks, rng: random.Random):
        self.folder, self.reference, self.marks, self.rng = folder, reference, marks, rng
        self.home, self.runs = folder / "home", 0
        self.saved: dict[Stage, int] = {}
        self.last, self.next = Stage.EVALUATE, 0

    def start(self) -> int:
        self.marks.clear()
        chain = rig.Chain(self.home, self.reference.profile, self.marks, self.last)
        return rig.fork(chain.run, self.marks, lambda: rig.watch(self.marks))

    def kills(
        self, fault: str, wanted: int, strike: Callable[[int], bool], last: Stage = Stage.EVALUATE,
        counts: Callable[[], bool] = lambda: True,
    ) -> Row:  # fmt: skip
        """Kill by `strike` until `wanted` kills counted; each home's last start is left to end and is compared."""
        row, where = Row(fault, LEVEL), Counter[str]()
        fresh, self.runs, self.last = True, 0, last
        while row.tries < wanted or not fresh:
            if fresh:
                self._new_home()
            pid = self.start()
            struck = row.tries < wanted and strike(pid)
            status = rig.wait(pid)
            if fresh := not (struck and status == -signal.SIGKILL):
                self._after_the_end(row, status)
                continue
            self._after_a_kill(row)
            if counts():
                row.tries += 1
                where[self._place()] += 1
        spread = ", ".join(f"{name} {count}" for name, count in sorted(where.items()))
        row.note = f"{self.runs} runs ended in the same SHA-256; killed in: {spread}"
        return row

    def _new_home(self) -> None:
        shutil.rmtree(self.home, ignore_errors=True)
        self.saved, self.next = {}, 0

    def in_a_stage(self, pid: int) -> bool:
        """Kill at a random moment of a stage chosen at random among those to come. False: the child ended first."""
        if self.next >= len(rig.ORDER):
            return False
        left = range(self.next, len(rig.ORDER))
        target = self.rng.choices(left, [WEIGHTS.get(rig.ORDER[n], 1) for n in left])[0]
        struck = self._strike(pid, lambda: self.marks.stage >= target, self.reference.took[rig.ORDER[target]])
        again = rig.ORDER[target] in rig.TRAINING or self.rng.random() < 0.5
        self.next = max(target, self.marks.stage) + (not again)
        return struck

    def in_a_save(self, pid: int) -> bool:
        """Kill at a random moment after the start of one of the saves to come; some come too late and do not count."""
        for _ in range(self.rng.randrange(4)):
            self._until(pid, lambda: self.marks.writing == 1)
            self._until(pid, lambda: self.marks.writing != 1)
        return self._strike(pid, lambda: self.marks.writing == 1, SAVE)

    def _strike(self, pid: int, ready: Callable[[], bool], within: float) -> bool:
        if not self._until(pid, ready):
            return False
        deadline = time.monotonic() + self.rng.random() * within
        time.sleep(max(0.0, deadline - time.monotonic() - 0.002))
        while time.monotonic() < deadline:
            pass  # a sleep is too coarse for a save of a few milliseconds
        os.kill(pid, signal.SIGKILL)
        return True

    def _until(self, pid: int, ready: Callable[[], bool]) -> bool:
        """Wait for `ready`; False where the child has ended (its status is left for `wait`)."""
        while not ready():
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return False
            time.sleep(POLL)
        return True

    def _place(self) -> str:
        stage = rig.ORDER[self.marks.stage] if self.marks.stage >= 0 else "start"
        return f"{stage}{('', ' (save)', ' (commit)')[self.marks.writing]}"

    def _resumed_far_enough(self, row: Row) -> None:
        for stage, step in self.saved.items():
            if (resumed := self.marks.resumed(stage)) >= 0:
                row.check(resumed >= step, f"{stage}: step {step} was saved, the next start began at {resumed}")

    def _after_a_kill(self, row: Row) -> None:
        self._resumed_far_enough(row)
        for stage in rig.TRAINING:
            if (step := self.marks.saved(stage)) >= 0:
                self.saved[stage] = step
        for line in rig.unsound(self.home):
            row.check(False, f"killed in {self._place()}: {line}")

    def _after_the_end(self, row: Row, status: int | None) -> None:
        if not row.check(status == 0, f"a start after kills ended with {status}: {self.marks.words}"):
            return
        self.runs += 1
        self._resumed_far_enough(row)
        row.check(self.marks.words == self.reference.digest, f"adapter {self.marks.words}, not as uninterrupted")
        for line in rig.leftovers(self.home) + rig.unsound(self.home):
            row.check(False, f"left at the end: {line}")

    def signals(self, wanted: int) -> Row:
        """SIGTERM or SIGINT while a step runs, and again at once: the state is saved, the next start ends alike."""
        row = Row("SIGTERM or SIGINT, then a second one", LEVEL)
        slowest = 0.0
        for _ in range(wanted):
            self._new_home()
            pid, at = self.start(), self.rng.randrange(rig.STEPS - 1)
            stage = self.rng.choice(rig.TRAINING)
            self._until(pid, lambda stage=stage, at=at: self.marks.saved(stage) >= at)  # type: ignore[misc]
            sent = time.monotonic()
            for _ in range(2):
                os.kill(pid, self.rng.choice((signal.SIGTERM, signal.SIGINT)))
            status = rig.wait(pid)
            slowest = max(slowest, time.monotonic() - sent)
            row.tries += 1
            stopped = status == 1 and self.marks.words.startswith("Stopped: stopped at step")
            row.check(stopped, f"after the signal: {status} {self.marks.words[:500]}")
            self._after_a_kill(row)
            self._after_the_end(row, rig.wait(self.start()))
        row.note = f"stopped within {slowest:.2f} s"
        row.check(slowest < 10, row.note)
        return row
