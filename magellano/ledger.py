"""What runs leave to be read and repeated: a numbered folder each.

    home/runs/<number>/run.json         what was asked, what it was made of, what came out, what it took (see Record)
    home/runs/<number>/<profile>.toml   the profile with its overrides, whole: `magellano train` takes this file
    home/runs/locks/<digest>.txt        the lock of the packages, each kept once
    home/runs/<number>/                 held (flock) by the run's process: one that is free and says "going" died
    home/runs/going                     held (flock) shared by every run, alone by `magellano gc`

`Run` writes a record while the run goes on; `records` reads them all. Nothing here knows Prefect.
"""

import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from magellano import artifacts, durable, energy, files, prices, toml
from magellano.artifacts import ArtifactRef, private_folder
from magellano.errors import InputError, Stopped
from magellano.names import RunState, Stage
from magellano.profile import Profile

log = logging.getLogger(__name__)

SCHEMA = 1
RUN = "run.json"
ROOT = Path(__file__).resolve().parent.parent


class StageDone(BaseModel):
    """One stage of a run. `name` differs from the stage's where the data of [pretrain] were tokenised."""

    name: str
    reused: bool
    seconds: float
    ref: ArtifactRef


class Record(BaseModel):
    """run.json. Times are UTC; `asked` holds profile, overrides and rerun as they were given."""

    model_config = ConfigDict(extra="ignore")

    number: int
    flow: str
    profile: str
    flow_run: str
    asked: dict[str, Any]
    state: RunState = RunState.GOING
    why: str = ""  # how it failed, or what there was to say
    started: str
    ended: str | None = None
    attempts: int = 1
    code: dict[str, Any]
    platform: dict[str, Any]
    lock: str
    data: dict[str, str] = {}  # names and digests of the data files, where they were looked at
    stages: list[StageDone] = []
    numbers: dict[str, Any] = {}
    gate: dict[str, Any] | None = None
    took: dict[str, Any] | None = None  # seconds, kwh, money: see energy.Meter.facts

    def stage(self, stage: Stage) -> StageDone | None:
        return next((s for s in self.stages if s.name == stage), None)


class Run:
    """The record of a run that goes on: a context that ends it, whatever happens, and takes time and energy.

    A run that is tried again (the same `flow_run`) goes on under its number.
    """

    def __init__(self, flow: str, profile: Profile, flow_run: str, asked: dict[str, Any]) -> None:
        root = private_folder(artifacts.home() / "runs")
        self._going = os.open(root / "going", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        fcntl.flock(self._going, fcntl.LOCK_SH)
        before = next((r for r in records() if r.flow_run == flow_run), None)
        number = before.number if before else _next(root)
        self.folder = root / str(number)
        self._alive = os.open(self.folder, os.O_RDONLY)  # held while this process lives
        fcntl.flock(self._alive, fcntl.LOCK_EX)
        self._before = before.took if before else None
        self.record = Record(
            number=number, flow=flow, profile=profile.name, flow_run=flow_run, asked=asked,
            started=before.started if before else now(), attempts=before.attempts + 1 if before else 1,
            code=code(), platform=dict(artifacts.platform_facts()), lock=_keep_lock(root),
        )  # fmt: skip
        settings = profile.model_dump(mode="json", exclude={"name"})
        durable.write_text(self.folder / f"{profile.name}.toml", toml.dumps(settings))
        self._save()
        self._meter = energy.Meter()

    def stage(self, name: str, ref: ArtifactRef, reused: bool, seconds: float) -> None:
        """A stage is done."""
        self.record.stages.append(StageDone(name=name, ref=ref, reused=reused, seconds=seconds))
        self._save()

    def say(self, **facts: Any) -> None:
        """Set fields of the record."""
        self.record = self.record.model_copy(update=facts)
        self._save()

    def took(self) -> dict[str, Any]:
        """Time, energy and money until now, earlier attempts included."""
        return energy.added(self._before, self._meter.facts(prices.load()))

    def __enter__(self) -> "Run":
        self._meter.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        state, why = self.record.state, self.record.why
        if error is not None:
            quiet = not isinstance(error, Exception) or isinstance(error, Stopped)  # a signal, Ctrl-C
            state = RunState.STOPPED if quiet else RunState.FAILED
            why = " ".join(f"{error}".split()) or type(error).__name__
        elif state is RunState.GOING:
            state = RunState.DONE
        self._meter.stop()
        try:
            self.say(state=state, why=why, ended=now(), took=self.took())
        except OSError as e:
            if error is None:
                raise
            log.warning("%s: the record of this run is not complete: %s", self.folder, e)  # what failed first is told
        finally:
            os.close(self._alive)
            os.close(self._going)

    def _save(self) -> None:
        text = json.dumps({"schema": SCHEMA, **self.record.model_dump(mode="json")}, indent=2)
        durable.write_text(self.folder / RUN, text + "\n")


def records() -> list[Record]:
    """All runs by number. One whose process died says so; a damaged record is left out with a warning."""
    folders = sorted(_folders(artifacts.home() / "runs"), key=lambda f: int(f.name))
    return [record for folder in folders if (record := _read(folder)) is not None]


def _read(folder: Path) -> Record | None:
    if not (folder / RUN).is_file():
        return None  # its process died before it had written anything, or is about to
    try:
        record = Record.model_validate(files.read_json(folder / RUN, "remove the folder", durable.MANIFEST_BYTES))
        if record.state is RunState.GOING and not durable.held(folder):
            record = Record.model_validate(
                files.read_json(folder / RUN, "remove the folder", durable.MANIFEST_BYTES)
            )  # it may have ended now
            if record.state is RunState.GOING:
                return record.model_copy(update={"state": RunState.DIED, "why": "its process died"})
        return record
    except (InputError, ValidationError) as e:
        log.warning("%s: left out, it is no record of a run: %s", folder, files.told(e))
        return None


def numbers(summaries: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What runs are compared by, from their stages' summaries."""
    found: dict[str, Any] = {}
    if training := summaries.get(Stage.TRAIN):
        found |= {k: training[k] for k in ("tokens_per_s", "peak_gib", "planned_gib") if k in training}
    if books := summaries.get(Stage.TOKENIZE, {}).get("accounting"):
        found |= {k: books[k] for k in ("rows_read", "used", "duplicates", "tokens_in", "trained", "held_out")}
    if evaluation := summaries.get(Stage.EVALUATE):
        tuned = evaluation["fine_tuned"]
        found |= {k: tuned[k] for k in ("loss", "perplexity", "bits_per_byte", "accuracy", "evenness")}
        found |= {"base_loss": evaluation["base"]["loss"], "loss_percent": -evaluation["verdict"]["loss_percent"]}
    return found


def find(run: str) -> Record:
    """The run of a number ("12", "#12"), or a profile's newest. InputError where there is none."""
    everything = records()
    text = run.removeprefix("#")
    numbered = [r for r in everything if text.isdigit() and r.number == int(text)]
    named = [r for r in everything if r.profile == run]
    if not numbered and not named:
        known = ", ".join(f"{r.number} ({r.profile})" for r in everything[-5:]) or "none; magellano train makes one"
        raise InputError(f"{run}: no run of that number or profile below {artifacts.home()}; there is {known}")
    return (numbered or named)[-1]


def profile_file(record: Record) -> Path:
    """The profile of a run, as a file that a new run can be given. InputError where it is not there."""
    path = artifacts.home() / "runs" / str(record.number) / f"{record.profile}.toml"
    if not path.is_file():
        raise InputError(f"{path}: the profile of run {record.number} is not there; start a run with the profile")
    return path


@contextmanager
def alone() -> Iterator[bool]:
    """Whether no run goes on; while the context lasts none begins."""
    fd = os.open(private_folder(artifacts.home() / "runs") / "going", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(fd)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


@functools.cache
def code() -> dict[str, Any]:
    """The package's version, its commit, and whether the checkout differs from it (None: no checkout)."""
    facts: dict[str, Any] = dict(artifacts.code_version())
    changed = None
    if facts["commit"] and shutil.which("git"):
        command = ["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"]
        changed = bool(subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip())
    return {**facts, "changed": changed}


def _next(root: Path) -> int:
    """Make the folder of the next number."""
    number = max((int(f.name) for f in _folders(root)), default=0) + 1
    while True:
        try:
            (root / str(number)).mkdir(mode=0o700)
            return number
        except FileExistsError:  # another run took it
            number += 1


def _folders(root: Path) -> list[Path]:
    return [f for f in root.glob("[0-9]*") if f.name.isdigit() and f.is_dir()]


@functools.cache
def _lock_text() -> str:
    """requirements.lock of the checkout, and what is really installed."""
    lock = ROOT / "requirements.lock"
    installed = sorted({f"{d.metadata['Name']}=={d.version}" for d in importlib.metadata.distributions()})
    text = lock.read_text(encoding="utf-8") if lock.is_file() else "# no checkout: no requirements.lock\n"
    return "\n".join(["# installed", *(f"# {line}" for line in installed), "", text])


def _keep_lock(root: Path) -> str:
    """Its digest; its text lies under that name."""
    digest = hashlib.sha256(_lock_text().encode()).hexdigest()[:32]
    path = private_folder(root / "locks") / f"{digest}.txt"
    if not path.exists():
        durable.write_text(path, _lock_text())
    return digest
