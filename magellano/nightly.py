"""What is new since the last judged run of a profile: found by digest, never by time."""

from dataclasses import dataclass
from typing import Any

from magellano import artifacts, ledger, pipeline, registry
from magellano.artifacts import MANIFEST
from magellano.names import BaseSource, Stage
from magellano.profile import Profile


@dataclass(frozen=True)
class News:
    """`text`: what is new, a line; `made`: the fingerprint of what a run would be made of; `files`: their digests."""

    anything: bool
    text: str
    made: str
    files: dict[str, str]


def look(profile: Profile) -> News:
    """Compare data, base, settings and stages with those of the release that was judged last. InputError as reading."""
    from magellano.data import readers

    found = readers.contents(profile.data)
    data = readers.digest_of(profile.data, found)
    pretrained = profile.pretrain is not None and profile.base.source is BaseSource.PRETRAIN
    more = readers.digest(profile.pretrain.data) if profile.pretrain is not None and pretrained else None
    base = pipeline.base_digest(profile) if profile.base.source is BaseSource.FOLDER else None
    made, listed = pipeline.fingerprint(profile, data, more, base), dict(found)
    shelf = registry.read().shelf(profile.name)
    if not shelf.entries:
        return News(True, "the first run of this profile", made, listed)
    last = shelf.entries[-1]
    which = f"run {last.run} ({last.decided[:16].replace('T', ' ')} UTC, {last.decision})"
    if last.run is None:
        return News(True, f"the release judged last, {last.release[:8]}, was promoted by hand", made, listed)
    if made != last.made:
        return News(True, f"since {which}: {_changes(_files_of(last.run, last.lineage), listed)}", made, listed)
    if shelf.current is not None and not _is_there(shelf.current):
        return News(True, f"nothing new since {which}, but the promoted adapter's folder is gone", made, listed)
    return News(False, f"nothing new since {which}: data {data[:12]}, base and settings are the same", made, listed)


def _files_of(run: int, lineage: dict[str, Any]) -> dict[str, str]:
    """The data files of a judged release, by the record of its run; by the registry where that is gone."""
    record = next((r for r in ledger.records() if r.number == run), None)
    return record.data if record is not None else lineage["data"]["files"]


def _changes(old: dict[str, str], new: dict[str, str]) -> str:
    kinds = {
        "new": [name for name in new if name not in old],
        "changed": [name for name in new if name in old and new[name] != old[name]],
        "gone": [name for name in old if name not in new],
    }
    said = [f"{kind}: {', '.join(sorted(names)[:5])}{_rest(len(names) - 5)}" for kind, names in kinds.items() if names]
    return "; ".join(said) or "the same data files; base, settings or stages changed"


def _rest(count: int) -> str:
    return f" and {count} more" if count > 0 else ""


def _is_there(release: str) -> bool:
    return (artifacts.home() / "artifacts" / Stage.CHECKPOINT / release / MANIFEST).is_file()
