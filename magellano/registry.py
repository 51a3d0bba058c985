"""The promoted adapters: home/registry.json, to be read by people and by `magellano generate PROFILE@promoted`.

For each profile: the release that is in force, the fixed held-out set that decides, every release that was ever judged
with its reason, numbers and lineage (data, base, code, settings), and what happened when. Written whole or not at all,
by one process at a time (flock on home/locks/registry).
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from magellano import artifacts, durable, files, ledger
from magellano.artifacts import ArtifactRef, private_folder
from magellano.errors import InputError
from magellano.names import Decision

SCHEMA = 1
NAME = "registry.json"
Key = Annotated[str, Field(pattern=r"^[0-9A-Za-z_-]{1,64}$")]  # it becomes a folder's name


class HeldOut(BaseModel):
    """The tokens whose held-out split decides, and how they were split: a release may have trained on others."""

    ref: ArtifactRef
    since: str
    split: dict[str, Any]  # seed, share and format of the data

    @field_validator("ref")
    @classmethod
    def _key(cls, ref: ArtifactRef) -> ArtifactRef:
        TypeAdapter(Key).validate_python(ref.key)
        return ref


class Entry(BaseModel):
    """A release that was judged. `made`: the fingerprint of what it was made of; `lineage`: the same for people."""

    release: Key
    digest: str
    run: int | None
    decided: str
    decision: Decision
    reason: str
    made: str
    numbers: dict[str, Any]
    lineage: dict[str, Any]


class Event(BaseModel):
    """`before`: the release in force until then."""

    at: str
    decision: Decision
    release: Key
    before: Key | None
    reason: str
    run: int | None = None


class Shelf(BaseModel):
    """One profile's part. `current` is the release in force."""

    current: Key | None = None
    held_out: HeldOut | None = None
    entries: list[Entry] = []
    history: list[Event] = []

    def entry(self, release: str | None) -> Entry | None:
        """What is known of a release; its newest judgement."""
        return next((e for e in reversed(self.entries) if e.release == release), None)

    def promoted(self) -> list[str]:
        """The releases that were ever in force, by their last promotion."""
        order: list[str] = []
        for event in self.history:
            if event.decision is Decision.PROMOTED:
                order = [r for r in order if r != event.release] + [event.release]
        return order

    def previous(self) -> str | None:
        """The release that was in force before the present one was promoted."""
        promotions = [e for e in self.history if e.decision is Decision.PROMOTED and e.release == self.current]
        return promotions[-1].before if promotions else None

    def judge(self, entry: Entry) -> None:
        """Enter a judgement; a promoted release is in force from now on."""
        self.entries = [e for e in self.entries if e.release != entry.release] + [entry]
        self._happened(entry.decision, entry.release, entry.reason, entry.run)
        if entry.decision is Decision.PROMOTED:
            self.current = entry.release

    def roll_back(self, release: str, reason: str) -> None:
        """An earlier release is in force again."""
        self._happened(Decision.ROLLED_BACK, release, reason, None)
        self.current = release

    def _happened(self, decision: Decision, release: str, reason: str, run: int | None) -> None:
        event = Event(at=ledger.now(), decision=decision, release=release, before=self.current, reason=reason, run=run)
        self.history.append(event)


class Registry(BaseModel):
    """The whole file."""

    model_config = ConfigDict(extra="forbid")

    profiles: dict[str, Shelf] = {}

    def shelf(self, profile: str) -> Shelf:
        return self.profiles.setdefault(profile, Shelf())


def path() -> Path:
    return artifacts.home() / NAME


def read() -> Registry:
    """The registry; empty where there is none. InputError where it is not what was written here."""
    if not os.path.lexists(path()):
        return Registry()
    remedy = "put a good copy in its place"
    data = files.read_json(path(), remedy, durable.MANIFEST_BYTES)
    if data.pop("schema", None) != SCHEMA:
        raise InputError(f"{path()}: not of schema {SCHEMA}; {remedy}")
    try:
        return Registry.model_validate(data)
    except ValidationError as e:
        raise InputError(f"{path()}: {files.told(e)}; {remedy}") from None


@contextmanager
def changed() -> Iterator[Registry]:
    """The registry to change: written when the context ends well, while nobody else may change it."""
    lock = private_folder(artifacts.home() / "locks") / "registry"
    fd = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        registry = read()
        yield registry
        facts = {"schema": SCHEMA, **registry.model_dump(mode="json")}
        durable.write_text(path(), json.dumps(facts, indent=2, ensure_ascii=False) + "\n")
    finally:
        os.close(fd)


def current(profile: str) -> str:
    """The key of the release in force. InputError where there is none."""
    registry = read()
    found = registry.profiles[profile].current if profile in registry.profiles else None
    if found is None:
        known = ", ".join(name for name, shelf in registry.profiles.items() if shelf.current) or "none"
        raise InputError(
            f"{profile}: no promoted adapter of this profile (there is {known}); magellano nightly {profile}"
        )
    return found


def roll_back(what: str | None, verify: Any) -> dict[str, Any]:
    """Put an earlier promoted release in force: a profile's name means the one before the present one, the start of a
    key that one, None the only profile's. `verify(key)` raises where a release cannot be used. InputError where it is
    not clear which.
    """
    with changed() as registry:
        profile, release = _meant(registry, what)
        shelf = registry.profiles[profile]
        if release == shelf.current:
            raise InputError(f"{release[:8]}: is already in force for {profile}; give the key of another")
        verify(release)
        before = shelf.current
        shelf.roll_back(release, f"by hand: magellano rollback {what or ''}".strip())
    return {"profile": profile, "release": release, "before": before, "registry": str(path())}


def _meant(registry: Registry, what: str | None) -> tuple[str, str]:
    known = [(name, key) for name, shelf in registry.profiles.items() for key in shelf.promoted()]
    if not known:
        raise InputError(f"{path()}: nothing was promoted yet; magellano nightly PROFILE does that")
    names = sorted({name for name, _ in known})
    if what is None and len(names) > 1:
        raise InputError(f"several profiles have promoted adapters ({', '.join(names)}); name one")
    if what is None or what in names:
        name = what or names[0]
        shelf = registry.profiles[name]
        if (previous := shelf.previous()) is None:
            at = (shelf.current or "?")[:8]
            raise InputError(f"{name}: no adapter was in force before {at}; give the key of another")
        return name, previous
    keyed = [pair for pair in known if pair[1].startswith(what)]
    if len(keyed) != 1:
        said = ", ".join(f"{key[:8]} ({name})" for name, key in known[-8:])
        raise InputError(f"{what}: {len(keyed) or 'no'} promoted adapters start so; there are {said}")
    return keyed[0]
