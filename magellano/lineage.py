"""From an artifact to all that it was made from, by what the manifests name."""

import json
from collections.abc import Iterable
from typing import Any

from magellano import durable, files, ledger
from magellano.artifacts import MANIFEST, ArtifactRef, Store
from magellano.errors import InputError
from magellano.names import Stage
from magellano.profile import Profile

Place = tuple[Stage, str]  # an artifact: its stage and key
FILES = 100  # data files that are listed one by one; the record of the run lists all


def inputs(store: Store, of: Place | ArtifactRef) -> dict[str, ArtifactRef]:
    """The artifacts that one was made from, by the names that its manifest gives them; none where it is not there."""
    stage, key = (of.stage, of.key) if isinstance(of, ArtifactRef) else of
    folder = store.home / "artifacts" / stage / key
    try:
        named = files.read_json(folder / MANIFEST, "build it again", durable.MANIFEST_BYTES)["inputs"]
    except (InputError, KeyError):
        return {}
    refs = {name: value for name, value in named.items() if isinstance(value, dict)}
    return {name: ArtifactRef.model_validate(value) for name, value in refs.items()}


def closure(store: Store, roots: Iterable[Place]) -> set[Place]:
    """`roots` and everything that they were made from, directly or not."""
    found: set[Place] = set()
    waiting = list(roots)
    while waiting:
        place = waiting.pop()
        if place not in found:
            found.add(place)
            waiting += [(ref.stage, ref.key) for ref in inputs(store, place).values()]
    return found


def of(store: Store, release: ArtifactRef, profile: Profile, data: dict[str, str]) -> dict[str, Any]:
    """What made a release, as JSON for people: data, base, code, settings, and every artifact on the way.

    `data`: names and digests of the data files; they are listed one by one where they are few.
    """
    direct = inputs(store, release)
    tokens, base = store.manifest(direct["tokens"]), direct["base"]
    source = {"source": str(profile.base.source), "folder": profile.base.folder}
    facts = json.loads((store.path(direct["tokens"]) / "tokens.json").read_text(encoding="utf-8"))
    below = sorted(closure(store, [(release.stage, release.key)]))
    return {
        "data": {
            "digest": tokens["inputs"]["data"],
            "count": len(facts["files"]),
            "files": data if len(data) <= FILES else {},
            "rows": facts["files"] if len(facts["files"]) <= FILES else {},
        },
        "base": {**source, "key": base.key, "digest": base.digest},
        "code": {**ledger.code(), "trained_by": store.manifest(direct["trained"])["code"]},
        "settings": profile.model_dump(mode="json", exclude={"name", "description"}),
        "artifacts": [f"{stage}/{key}" for stage, key in below],
    }  # fmt: skip
