"""The command line itself, `magellano train`, in its own processes: killed, stopped, several at once, a full disk."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from magellano import durable
from tests.torture import rig
from tests.torture.outcome import Row, Share

ROOT = Path(__file__).resolve().parents[2]
LEVEL = "`magellano train`, its own processes"
KILLS, STOPS, STEPS = 16, 4, 80
PATIENCE = 240.0  # seconds
GONE = 30.0  # seconds after which what a killed command started must have ended
ONE_LINE = re.compile(r"magellano: .*the disk is full: at least [\d,]+ bytes are needed and [\d,]+ are free; .*")


def part(share: Share) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        site = Site(Path(name), random.Random(share.seed))
        yield killed(site, share.of(KILLS))
        yield stopped(site, share.of(STOPS))
        yield together(site)
        yield full_disk(Path(name))


def environment(home: Path) -> dict[str, str]:
    """The variables of a command whose artifacts go to `home`."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "MAGELLANO_"))}
    return plain | {"MAGELLANO_HOME": str(home), "PYTHONPATH": str(ROOT), "COLUMNS": "120"}


def command(profile: Path, *sets: str) -> list[str]:
    more = [word for one in sets for word in ("--set", one)]
    return [sys.executable, "-m", "magellano.cli", "train", str(profile), "--json", *more]


def processes_of(home: Path) -> list[int]:
    """The processes that have this home in their environment."""
    found, mark = [], f"MAGELLANO_HOME={home}\0".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if mark in path.read_bytes() + b"\0":
                found.append(int(path.parent.name))
        except OSError:  # it ended, or is another's
            continue
    return found


@dataclass
class Command:
    """A running command with its output."""

    home: Path
    profile: Path
    sets: tuple[str, ...] = ()
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self.out, self.err = (tempfile.TemporaryFile("w+") for _ in range(2))  # noqa: SIM115 (they end with it)
        self.process = subprocess.Popen(
            command(self.profile, *self.sets), cwd=ROOT, env=environment(self.home), stdin=subprocess.DEVNULL,
            stdout=self.out, stderr=self.err, start_new_session=True,
        )  # fmt: skip

    def end(self) -> int:
        """The exit status; what takes too long is killed."""
        try:
            return self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            return -999

    def said(self) -> str:
        self.err.seek(0)
        return self.err.read()

    def adapter(self) -> str:
        """The released adapter's SHA-256."""
        self.out.seek(0)
        stages = {stage["stage"]: stage for stage in json.load(self.out)["stages"]}
        return durable.sha256_file(Path(stages["checkpoint"]["path"]) / rig.ADAPTER)


class Site:
    """A profile and what an undisturbed command makes of it."""

    def __init__(self, folder: Path, rng: random.Random) -> None:
        self.folder, self.rng, self.homes = folder, rng, 0
        self.profile = rig.write_profile(folder)
        self.sets = (f"train.steps={STEPS}", "train.checkpoint_every=5")
        for _ in range(2):  # the second one is timed: the first fills caches
            whole = self.start(self.fresh())
            assert whole.end() == 0, whole.said()
            self.seconds = time.monotonic() - whole.started
        self.digest = whole.adapter()

    def fresh(self) -> Path:
        self.homes += 1
        return self.folder / f"home-{self.homes}"

    def start(self, home: Path) -> Command:
        return Command(home, self.profile, self.sets)

    def finish(self, row: Row, home: Path) -> None:
        """The next start ends, with the same bits, and leaves nothing behind."""
        last = self.start(home)
        status = last.end()
        if row.check(status == 0, f"the next start ended with {status}: {last.said()[-1500:]}"):
            row.check(last.adapter() == self.digest, "another adapter than uninterrupted")
        for line in rig.unsound(home) + rig.leftovers(home):
            row.check(False, f"at the end: {line}")

    def none_left(self, row: Row, home: Path) -> None:
        """What the command started has ended, at the latest some time after it was killed."""
        deadline = time.monotonic() + GONE
        while (left := processes_of(home)) and time.monotonic() < deadline:
            time.sleep(0.1)
        for pid in left:
            name = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            row.check(False, f"a process is left {GONE:g} s later: {name[:200]}")
            os.kill(pid, signal.SIGKILL)


def killed(site: Site, wanted: int) -> Row:
    """SIGKILL at a random moment, of the command alone or with all that it started; then the next start at once."""
    row = Row("SIGKILL at random, the command alone or its group", LEVEL)
    began = 0
    for number in range(wanted):
        home = site.fresh()
        victim = site.start(home)
        time.sleep(site.seconds * (0.2 + 0.75 * site.rng.random()))
        if number % 2:
            os.killpg(victim.process.pid, signal.SIGKILL)
        else:
            victim.process.kill()
        if victim.process.wait() != -signal.SIGKILL:
            continue  # it had ended: no try
        row.tries += 1
        began += (home / "work").exists()
        for line in rig.unsound(home):
            row.check(False, f"after the kill: {line}")
        site.finish(row, home)
        site.none_left(row, home)
    row.note = f"{began} of them after the first stage had begun; uninterrupted {site.seconds:.0f} s"
    return row


def stopped(site: Site, wanted: int) -> Row:
    """SIGTERM or SIGINT during training, twice: exit code 75, and the next start ends alike."""
    row, slowest = Row("SIGTERM or SIGINT while it trains: 75", LEVEL), 0.0
    for number in range(wanted):
        home = site.fresh()
        command = site.start(home)
        deadline = time.monotonic() + PATIENCE
        while not list(home.glob("work/train/*/step-*")) and time.monotonic() < deadline:
            time.sleep(0.02)
        sent = time.monotonic()
        for _ in range(2):
            command.process.send_signal((signal.SIGTERM, signal.SIGINT)[number % 2])
            time.sleep(0.02)
        status = command.end()
        slowest = max(slowest, time.monotonic() - sent)
        row.tries += 1
        said = command.said()
        row.check(status == 75, f"exit status {status}: {said[-1500:]}")
        row.check("Traceback" not in said, f"a traceback: {said[-1500:]}")
        site.finish(row, home)
        site.none_left(row, home)
    row.check(slowest < 15, f"the slowest took {slowest:.1f} s")
    row.note = f"ended within {slowest:.1f} s"
    return row


def together(site: Site) -> Row:
    """Three commands on one home at once: all end alike, each artifact is built once."""
    row, home = Row("three at once on one home", LEVEL), site.fresh()
    commands = [site.start(home) for _ in range(3)]
    built: list[str] = []
    for command in commands:
        status = command.end()
        row.tries += 1
        if row.check(status == 0, f"ended with {status}: {command.said()[-1500:]}"):
            row.check(command.adapter() == site.digest, "another adapter than alone")
            command.out.seek(0)
            built += [s["key"] for s in json.load(command.out)["stages"] if s["state"] == "built"]
    row.check(len(built) == len(set(built)), f"{len(built)} built, {len(set(built))} different")
    for line in rig.unsound(home) + rig.leftovers(home):
        row.check(False, f"at the end: {line}")
    return row


def full_disk(folder: Path) -> Row:
    """The home on a tmpfs of a few sizes, too small all: exit code 1 and one line; with space it then goes on."""
    row = Row("a home on a full disk", LEVEL)
    small, profile = folder / "small", rig.write_profile(folder)
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(small)]
    if subprocess.run(mount, capture_output=True).returncode:
        row.skipped = "may not mount a tmpfs"
        return row
    told: list[str] = []
    try:
        whole = Command(small / "home", profile)
        assert whole.end() == 0, whole.said()
        for stage in ("train", "pretrain"):
            subprocess.run(["rm", "-r", str(small / "home/artifacts" / stage)], check=True)
            filler, free = small / "filler", os.statvfs(small)
            filler.write_bytes(bytes(free.f_bavail * free.f_bsize - 150_000))
            command = Command(small / "home", profile, ("train.seed=7", "pretrain.train.seed=7"))
            status, said = command.end(), command.said()
            row.tries += 1
            last = (said.strip().splitlines() or [""])[-1]
            told.append(last.replace(str(folder), "..."))
            row.check(status == 1, f"exit status {status}: {said[-1500:]}")
            row.check(ONE_LINE.fullmatch(last), f"not told in one clear line: {said[-1500:]}")
            filler.unlink()
            for line in rig.unsound(small / "home"):
                row.check(False, line)
            again = Command(small / "home", profile, ("train.seed=7", "pretrain.train.seed=7"))
            row.check(again.end() == 0, f"with space again: {again.said()[-1500:]}")
    finally:
        subprocess.run(["umount", str(small)], check=True)
    row.note = told[0][:160] if told else ""
    return row
