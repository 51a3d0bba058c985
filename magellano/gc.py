"""What may go from $MAGELLANO_HOME, and letting it go.

Kept: every promoted release and the fixed held-out sets; the last runs of each flow and profile, and the last releases;
whatever these were made from; what an interrupted stage continues from, for a while. Records of runs are never removed.
"""

import logging
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magellano import durable, files, ledger, lineage, registry
from magellano.artifacts import ASIDE, MANIFEST, Store, home
from magellano.errors import InputError
from magellano.lineage import Place
from magellano.names import Stage

log = logging.getLogger(__name__)

KEEP = 2  # runs of each flow and profile
WORK_DAYS = 7.0  # how long an interrupted stage may be continued


@dataclass(frozen=True)
class Item:
    """Something that may go. `written`: when it last was, in seconds since 1970."""

    path: Path
    why: str
    bytes: int
    written: float

    @property
    def age(self) -> float:
        return time.time() - self.written


def kept(store: Store, keep: int = KEEP) -> dict[Place, str]:
    """The artifacts that stay, each with what it is kept for."""
    roots: dict[Place, str] = {}
    for name, shelf in registry.read().profiles.items():
        for key in shelf.promoted():
            roots[Stage.CHECKPOINT, key] = f"promoted of {name}"
        if shelf.held_out is not None:
            roots[shelf.held_out.ref.stage, shelf.held_out.ref.key] = f"fixed held-out set of {name}"
    for key, name in _last_releases(store, keep):
        roots.setdefault((Stage.CHECKPOINT, key), f"last releases of {name}")
    groups: dict[tuple[str, str], list[ledger.Record]] = defaultdict(list)
    for record in ledger.records():
        if record.stages:
            groups[record.flow, record.profile].append(record)
    for records in groups.values():
        for record in records[-keep:]:
            for stage in record.stages:
                roots.setdefault((stage.ref.stage, stage.ref.key), f"run {record.number}")
    reasons = dict(roots)
    for place, why in roots.items():
        for needed in lineage.closure(store, [place]):
            reasons.setdefault(needed, f"needed by {why}")
    return reasons


def plan(keep: int = KEEP) -> list[Item]:
    """What may go, oldest first."""
    if keep < 1:
        raise InputError(f"--keep {keep}: at least one run of each profile stays; give 1 or more")
    store = Store(home())
    reasons = kept(store, keep)
    found = [*_artifacts(reasons), *_left_over(), *_evaluations(reasons)]
    return sorted(found, key=lambda item: (item.written, item.path))


def remove(items: list[Item]) -> int:
    """Remove them; the bytes that went. InputError while a run goes on: it may be reading them."""
    with ledger.alone() as nobody:
        if not nobody:
            raise InputError("a run is going on, which may need what would go; try again when it has ended")
        for item in items:
            _remove(item.path)
    return sum(item.bytes for item in items)


def to_budget(limit: int, keep: int = KEEP) -> dict[str, Any]:
    """Remove what may go, oldest first, until everything takes `limit` bytes at most. Says how far that went."""
    total = _size(home())
    going: list[Item] = []
    for item in plan(keep) if total > limit else []:
        if total - sum(i.bytes for i in going) > limit:
            going.append(item)
    freed = remove(going) if going else 0
    return {"bytes": total - freed, "freed": freed, "removed": [str(item.path) for item in going], "limit": limit}


def _artifacts(reasons: dict[Place, str]) -> Iterator[Item]:
    for stage in Stage:
        for folder in (home() / "artifacts" / stage).glob(f"*/{MANIFEST}"):
            key = folder.parent.name
            if not key.startswith(".") and (stage, key) not in reasons:
                yield _item(folder.parent, "no kept run, promoted or last release needs it")


def _left_over() -> Iterator[Item]:
    for stage in Stage:
        root = home() / "artifacts" / stage
        for folder in root.glob(f"{ASIDE}/*"):
            yield _item(folder, "found damaged and set aside")
        for folder in root.glob(f"{durable.TEMPORARY}*"):
            yield _item(folder, "left by a process that died")
        for folder in (home() / "work" / stage).glob("*"):
            item = _item(folder, f"interrupted over {WORK_DAYS:g} days ago and not continued")
            if item.age > WORK_DAYS * 86400:
                yield item


def _evaluations(reasons: dict[Place, str]) -> Iterator[Item]:
    for folder in (home() / "evaluations").glob("*"):
        if (Stage.CHECKPOINT, folder.name) not in reasons:
            yield _item(folder, "an evaluation by hand of a release that goes or is gone")


def _last_releases(store: Store, keep: int) -> Iterator[tuple[str, str]]:
    """Key and profile of the newest releases: `magellano generate PROFILE` means these."""
    of: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for manifest in (store.home / "artifacts" / Stage.CHECKPOINT).glob(f"[!.]*/{MANIFEST}"):
        try:
            config = files.read_json(manifest, "build it again", durable.MANIFEST_BYTES)["config"]
        except (InputError, KeyError) as e:
            log.warning("%s: no manifest of a release: %s", manifest, files.told(e))
            continue
        of[str(config.get("profile"))].append((manifest.stat().st_mtime, manifest.parent.name))
    for profile, releases in of.items():
        yield from ((key, profile) for _, key in sorted(releases)[-keep:])


def _item(folder: Path, why: str) -> Item:
    newest = max((p.lstat().st_mtime for p in (folder, *folder.rglob("*"))), default=time.time())
    return Item(folder, why, _size(folder), newest)


def _size(folder: Path) -> int:
    return sum(p.lstat().st_size for p in folder.rglob("*") if p.is_file() and not p.is_symlink())


def _remove(folder: Path) -> None:
    """Renamed first, so that a kill leaves nothing under its name that is not whole."""
    if not folder.exists():
        return
    if (folder / MANIFEST).is_file() and folder.parent.name in set(Stage):
        dead = folder.with_name(f"{durable.TEMPORARY}{folder.name}.old")
        shutil.rmtree(dead, ignore_errors=True)
        folder = folder.rename(dead)
    shutil.rmtree(folder)
