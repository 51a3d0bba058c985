"""Several processes want one artifact at once, and the one that builds it may be killed: built once, nobody blocked."""

import os
import random
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from magellano.artifacts import Store
from magellano.names import Stage
from tests.torture import rig
from tests.torture.outcome import Row, Share

BUILDS = 200
BLOCKED = 30.0  # seconds after which a process counts as blocked


def part(share: Share) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        yield contended(Path(name), share)


def contended(home: Path, share: Share) -> Row:
    """Two to eight processes a build; in half of the builds a holder of the lock is killed, or two in turn."""
    row = Row("contended builds, holders killed", "Store.build by 2 to 8 processes")
    rng, processes, killed, slowest = random.Random(share.seed), 0, 0, 0.0
    for number in range(share.of(BUILDS, 8)):
        group = Group(home, f"{number:032d}", rng)
        deaths = (0, 1, 0, 2)[number % 4]
        for _ in range(deaths):
            killed += group.kill_the_holder()
        started = time.monotonic()
        status = {pid: rig.wait(pid, BLOCKED) for pid in group.pids}
        slowest = max(slowest, time.monotonic() - started)
        row.tries, processes = row.tries + 1, processes + len(group.pids)
        group.judge(row, status)
    row.note = f"{processes} processes, {killed} holders killed; the longest wait for all of a build {slowest:.1f} s"
    return row


class Group:
    """The processes that want one artifact."""

    def __init__(self, home: Path, key: str, rng: random.Random) -> None:
        self.home, self.key = home, key
        self.marks = [rig.Marks() for _ in range(rng.randrange(2, 9))]
        self.delays = [rng.random() * 0.02 for _ in self.marks]
        self.pids = [rig.fork(lambda n=n: self.want(n), mark) for n, mark in enumerate(self.marks)]  # type: ignore[misc]
        self.dead: set[int] = set()

    def want(self, number: int) -> str:
        def make(out: Path) -> dict[str, object]:
            (out / "first").write_bytes(os.urandom(2000))
            self.marks[number].stage = 1  # builds
            time.sleep(self.delays[number])
            (out / "second").write_text(str(number))
            return {"by": number}

        built = Store(self.home).build(Stage.QUANTIZE, self.key, version=1, inputs={}, config={}, make=make)
        return f"{built.ref.digest} {built.reused}"

    def kill_the_holder(self) -> bool:
        """Kill who builds now. False where the artifact was finished first."""
        deadline = time.monotonic() + BLOCKED
        while time.monotonic() < deadline:
            for number, (pid, mark) in enumerate(zip(self.pids, self.marks, strict=True)):
                if number not in self.dead and mark.stage == 1:
                    os.kill(pid, signal.SIGKILL)
                    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
                    self.dead.add(number)
                    return not mark.words
            if all(os.waitid(os.P_PID, p, os.WEXITED | os.WNOHANG | os.WNOWAIT) for p in self.pids):
                return False
        return False

    def judge(self, row: Row, status: dict[int, int | None]) -> None:
        said = [mark.words.split() for n, mark in enumerate(self.marks) if status[self.pids[n]] == 0]
        blocked = [pid for pid, code in status.items() if code is None]
        failed = [m.words for n, m in enumerate(self.marks) if status[self.pids[n]] not in (0, None, -signal.SIGKILL)]
        row.check(not blocked, f"{len(blocked)} of {len(status)} blocked for {BLOCKED:g} s")
        row.check(not failed, f"failed: {failed[:1]}")
        alive = len(status) - len(self.dead)
        row.check(len(said) >= alive, f"{len(said)} of {alive} living processes got the artifact")
        row.check(len({digest for digest, _ in said}) <= 1, "different digests")
        builders = [1 for _, reused in said if reused == "False"]
        most = 1 if said else 0
        row.check(len(builders) <= most, f"built {len(builders)} times by processes that ended well")
        if not said:
            return
        reference = Store(self.home).find(Stage.QUANTIZE, self.key)
        row.check(reference and reference.digest == said[0][0], "what is there is not what was said")
        row.check(builders or self.dead, "all reused it and nobody built it")
