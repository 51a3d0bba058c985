"""The artifact store: what a stage wrote, under a key that says what it depends on. The pipeline's only cache.

    home/artifacts/<stage>/<key>/           the stage's files and manifest.json, whole and verified, or not there
    home/artifacts/<stage>/.tmp-<key>/      being written by the holder of the key's lock; else left by a dead one
    home/artifacts/<stage>/.aside/<key>-N/  found damaged, kept for a look
    home/locks/<stage>-<key>                held (flock) while the artifact is built; freed when the holder dies
    home/work/<stage>/<key>/                what an interrupted stage continues from; gone once the artifact is there

Keys hold no time and no path, so a home can be moved or shared. Nothing here knows Prefect.
"""

import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from magellano import disk, durable
from magellano.names import METRICS, Stage

log = logging.getLogger(__name__)
private_folder = durable.private_folder

SCHEMA = 1
MANIFEST = "manifest.json"
ASIDE = ".aside"
_OLD = ".old"
PACKAGE = "scm-magellano"


class ArtifactRef(BaseModel):
    """A stage's result: small, JSON, and without a path, so that it stays true when the home moves."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stage: Stage
    key: str
    digest: str  # of the content: equal bytes give equal digests, whenever and by whatever version they were made
    bytes: int  # of what the digest covers: measured times are in neither, for releases record this reference


class Built(NamedTuple):
    """An artifact and whether it was there already."""

    ref: ArtifactRef
    reused: bool


Inputs = Mapping[str, ArtifactRef | str]


def home() -> Path:
    """Where everything is kept: $MAGELLANO_HOME, else .magellano below the current folder."""
    return Path(os.environ.get("MAGELLANO_HOME") or ".magellano").expanduser().absolute()


def stage_key(stage: Stage, version: int, config: Mapping[str, Any], inputs: Inputs) -> str:
    """32 hex digits that depend on the stage, its version, its settings and its inputs' content, and on nothing else.

    TypeError for values with no stable JSON form (sets, paths, dates, ...): their keys would differ between processes.
    """
    digests = {name: i.digest if isinstance(i, ArtifactRef) else i for name, i in inputs.items()}
    what = {"stage": stage, "version": version, "config": config, "inputs": digests}
    text = json.dumps(_plain(what), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def content_digest(files: Mapping[str, Mapping[str, Any]]) -> str:
    """SHA-256 over names and SHA-256s of a manifest's files: the content, not when or by whom it was made."""
    listed = sorted((name, facts["sha256"]) for name, facts in files.items() if name != METRICS)
    return hashlib.sha256(json.dumps(listed).encode()).hexdigest()


@dataclass(frozen=True)
class Store:
    """The artifacts below `home`. `deep`: hash every file before it is trusted, else compare sizes alone."""

    home: Path
    deep: bool = True
    _held: dict[tuple[Stage, str], int] = field(default_factory=dict, init=False, repr=False, compare=False)

    def path(self, ref: ArtifactRef) -> Path:
        """The folder of an artifact."""
        return self._folder(ref.stage, ref.key)

    def find(self, stage: Stage, key: str) -> ArtifactRef | None:
        """The artifact if it is there and sound. A damaged one is set aside with a warning, and is not there."""
        ref, why = self._check(stage, key)
        old = self._folder(stage, durable.TEMPORARY + key + _OLD)
        if why is None and (ref is not None or not (old.exists() or self._folder(stage, key).exists())):
            return ref  # found; or not there, and not because it was just being replaced
        with self._locked(stage, key):  # nobody builds it now; look again, it may have been replaced meanwhile
            return self._find_locked(stage, key)

    def manifest(self, ref: ArtifactRef) -> dict[str, Any]:
        """What is recorded about an artifact: inputs, settings, code, platform, files, the stage's summary."""
        manifest: dict[str, Any] = json.loads((self.path(ref) / MANIFEST).read_text(encoding="utf-8"))
        return manifest

    def work(self, stage: Stage, key: str) -> Path:
        """The folder that an interrupted stage continues from; for the `make` of this key's build alone."""
        return private_folder(self.home / "work" / stage / key)

    def lock(self, stage: Stage, key: str) -> int:
        """The descriptor of this key's lock, for the `make` of its build alone: a child process that inherits it holds
        the lock too, so that nobody builds beside a child whose parent was killed.
        """
        return self._held[stage, key]

    def build(
        self, stage: Stage, key: str, *, version: int, inputs: Inputs, config: Mapping[str, Any],
        make: Callable[[Path], dict[str, Any]], rerun: str = "",
    ) -> Built:  # fmt: skip
        """The artifact of `key`: the one that is there, or what `make` writes into an empty folder.

        `make` returns its summary; what it raises passes through and leaves nothing half-written, DiskFull where space
        ran out. Of several processes that want the same key one builds, the others wait. `rerun`, an id, builds again
        what is there unless it was built under that id: a retry of a run that asked for it does not build it twice.
        """
        with self._locked(stage, key):
            self._remove_dead(stage, ours=key)
            ref = self._find_locked(stage, key)
            if ref and (not rerun or self.manifest(ref)["rerun"] == rerun):
                self._drop_work(stage, key)  # left where its builder was killed right after the commit
                return Built(ref, reused=True)
            temporary = private_folder(self._folder(stage, durable.TEMPORARY + key))
            facts = {
                "schema": SCHEMA, "stage": stage, "key": key, "version": version, "rerun": rerun,
                "config": _plain(config), "inputs": _recorded(inputs),
                "code": code_version(), "platform": platform_facts(),
            }  # fmt: skip
            try:
                with disk.told_when_full(temporary):
                    return Built(self._commit(stage, key, temporary, facts, make(temporary)), reused=False)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)

    def _commit(
        self, stage: Stage, key: str, temporary: Path, facts: dict[str, Any], summary: dict[str, Any]
    ) -> ArtifactRef:
        odd = [p for p in temporary.rglob("*") if p.is_symlink() or not (p.is_dir() or p.is_file())]
        assert not odd, f"stage {stage} wrote {odd[0]}, which is neither a file nor a folder"
        for folder in (p for p in temporary.rglob("*") if p.is_dir()):
            folder.chmod(0o700)
        manifest = durable.seal(temporary, MANIFEST, {**facts, "summary": _plain(summary)})
        assert manifest["files"], f"stage {stage} wrote no file"
        final, old = self._folder(stage, key), temporary.with_name(temporary.name + _OLD)
        if final.exists():
            final.rename(old)  # renamed, not removed in place: a kill leaves either whole; see _remove_dead
        durable.publish(temporary, final)
        shutil.rmtree(old, ignore_errors=True)
        self._drop_work(stage, key)
        return _ref(manifest)

    def _drop_work(self, stage: Stage, key: str) -> None:
        work = self.home / "work" / stage / key
        gone = work.with_name(durable.TEMPORARY + key)
        shutil.rmtree(gone, ignore_errors=True)
        if work.exists():
            work.rename(gone)  # a kill must not leave half of a checkpoint under its name
            shutil.rmtree(gone, ignore_errors=True)

    def _folder(self, stage: Stage, name: str) -> Path:
        return self.home / "artifacts" / stage / name

    def _check(self, stage: Stage, key: str) -> tuple[ArtifactRef | None, str | None]:
        """(ref, None) sound, (None, None) not there, (None, why) damaged."""
        folder = self._folder(stage, key)
        if not folder.exists():
            return None, None
        if why := durable.damage(folder, MANIFEST, self.deep):
            return None, why
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest.get("schema") != SCHEMA:
            return None, f"{MANIFEST} has schema {manifest.get('schema')}, this version reads {SCHEMA}"
        if (manifest.get("stage"), manifest.get("key")) != (stage, key):
            return None, f"{MANIFEST} is that of {manifest.get('stage')}/{manifest.get('key')}"
        return _ref(manifest), None

    def _find_locked(self, stage: Stage, key: str) -> ArtifactRef | None:
        ref, why = self._check(stage, key)
        if why is not None:
            folder, aside = self._folder(stage, key), private_folder(self._folder(stage, ASIDE))
            taken = {p.name for p in aside.iterdir()}
            free = next(name for n in range(len(taken) + 1) if (name := f"{key}-{n}") not in taken)
            folder.rename(aside / free)
            log.warning(
                "%s artifact %s is damaged: %s; set aside as %s/%s, it will be built again",
                stage,
                key,
                why,
                ASIDE,
                free,
            )
        return ref

    def _remove_dead(self, stage: Stage, ours: str) -> None:
        """Remove temporary folders whose builder is gone: their key's lock is free, or is held by the caller. What it
        had moved away for a rerun that never took its place goes back there.
        """
        for folder in self._folder(stage, "").glob(durable.TEMPORARY + "*"):
            key = folder.name.removeprefix(durable.TEMPORARY).removesuffix(_OLD)
            lock = None if key == ours else self._try_lock(stage, key)
            if (key == ours or lock is not None) and folder.exists():  # else its builder has just finished
                final = self._folder(stage, key)
                if folder.name.endswith(_OLD) and not final.exists():
                    log.warning("%s %s: putting back what a rerun that died had moved away", stage, key)
                    folder.rename(final)
                else:
                    log.warning("removing %s, left by a process that died", folder)
                    shutil.rmtree(folder)
            if lock is not None:
                os.close(lock)

    @contextmanager
    def _locked(self, stage: Stage, key: str) -> Iterator[None]:
        fd = self._try_lock(stage, key)
        if fd is None:
            fd = self._open_lock(stage, key)
            log.info(
                "%s %s is being built by process %s: waiting", stage, key, os.pread(fd, 32, 0).decode() or "unknown"
            )
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            os.ftruncate(fd, 0)
            os.pwrite(fd, str(os.getpid()).encode(), 0)
            self._held[stage, key] = fd
            yield
        finally:
            self._held.pop((stage, key), None)
            os.close(fd)

    def _try_lock(self, stage: Stage, key: str) -> int | None:
        """The lock's descriptor, closing which frees it; None where another process, or another thread, holds it."""
        fd = self._open_lock(stage, key)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError:
            os.close(fd)
            return None

    def _open_lock(self, stage: Stage, key: str) -> int:
        path = private_folder(self.home / "locks") / f"{stage}-{key}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        os.fchmod(fd, 0o600)
        return fd  # never removed: a removed lock file could be locked twice


def _ref(manifest: Mapping[str, Any]) -> ArtifactRef:
    files = manifest["files"]
    size = sum(facts["bytes"] for name, facts in files.items() if name != METRICS)
    return ArtifactRef(stage=Stage(manifest["stage"]), key=manifest["key"], digest=content_digest(files), bytes=size)


def _recorded(inputs: Inputs) -> dict[str, Any]:
    return {name: i.model_dump(mode="json") if isinstance(i, ArtifactRef) else i for name, i in inputs.items()}


def _plain(value: Any) -> Any:
    """`value` as JSON types alone."""
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="json"))
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, Mapping):
        if odd := [k for k in value if not isinstance(k, str)]:
            raise TypeError(f"{odd[0]!r} may not name a value in a key: only strings may")
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} may not enter a key: it has no stable JSON form")


@functools.cache
def code_version() -> dict[str, str | None]:
    """The package's version and, in a checkout, its commit; recorded, never part of a key."""
    root, commit = Path(__file__).resolve().parent.parent, None
    if (root / ".git").exists() and shutil.which("git"):
        done = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10)
        commit = done.stdout.strip() or None
    return {"version": _version(PACKAGE), "commit": commit}


@functools.cache
def platform_facts() -> dict[str, str | None]:
    """Where an artifact was made; recorded, never part of a key."""
    system = {"system": platform.system(), "machine": platform.machine(), "python": platform.python_version()}
    return {**system, "mlx": _version("mlx")}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
