"""Finding what was made before: RUN on the command line, and from one artifact to those that it was made from."""

import os
import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from magellano import durable, files, lora, registry
from magellano.artifacts import MANIFEST, Store, home
from magellano.errors import InputError
from magellano.names import Stage
from magellano.profile import Profile
from magellano.stages.checkpoint import PROFILE

PROMOTED = "@promoted"


def input_folder(artifact: Path, stage: Stage) -> Path | None:
    """The artifact of `stage` that `artifact` was made from; None where its manifest names none or it is gone."""
    if not os.path.lexists(artifact / MANIFEST):
        return None
    inputs = files.read_json(artifact / MANIFEST, lora.REMEDY, durable.MANIFEST_BYTES).get("inputs")
    for ref in inputs.values() if isinstance(inputs, dict) else ():
        if isinstance(ref, dict) and ref.get("stage") == stage:
            key = ref.get("key")
            if not isinstance(key, str) or not re.fullmatch(r"[\w-]{1,64}", key, re.ASCII):
                raise InputError(f"{artifact / MANIFEST}: inputs: {files.shown(key)} is no key; {lora.REMEDY}")
            folder = artifact.parent.parent / stage / key
            return folder if folder.is_dir() else None
    return None


@dataclass(frozen=True)
class Release:
    """A sealed release and the profile that made it."""

    folder: Path
    profile: Profile

    @classmethod
    def find(cls, run: str) -> "Release":
        """The release that `run` means: a folder, the start of a key, a profile's name for that one's newest, or
        PROFILE@promoted for the one in force.

        Raises InputError where there is none, or more than one.
        """
        if (Path(run) / lora.CONFIG).is_file():
            return cls.read(Path(run).resolve())
        if Path(run).is_dir():
            raise InputError(f"{run}: no {lora.CONFIG} in it; not a release")
        if run.endswith(PROMOTED):
            return cls.read(home() / "artifacts" / Stage.CHECKPOINT / registry.current(run.removesuffix(PROMOTED)))
        everything = [cls.read(folder) for folder in _folders()]
        if named := [release for release in everything if release.profile.name == run]:
            return named[-1]
        keyed = [release for release in everything if release.folder.name.startswith(run)]
        if len(keyed) > 1:
            raise InputError(f"{run}: {len(keyed)} releases start so ({_list(keyed)}); give more of the key")
        if not keyed:
            known = _list(everything[-5:]) or "none; magellano train PROFILE makes one"
            raise InputError(f"{run}: no release of that folder, key or profile below {home()}; there is {known}")
        return keyed[0]

    @classmethod
    def read(cls, folder: Path) -> "Release":
        """The release in `folder`, verified where it lies in the store. InputError where it is damaged."""
        in_store = folder.parent == home() / "artifacts" / Stage.CHECKPOINT
        if in_store and Store(home()).find(Stage.CHECKPOINT, folder.name) is None:
            raise InputError(f"{folder}: this release is damaged and was set aside; run magellano train again")
        if not (folder / PROFILE).exists():
            raise InputError(f"{folder}: no {PROFILE}; not a release made here")
        data = files.read_json(folder / PROFILE, lora.REMEDY)
        try:
            return cls(folder, Profile.model_validate(data))
        except ValidationError as e:
            raise InputError(f"{folder / PROFILE}: not a profile of this version: {files.told(e)}") from None

    @property
    def base(self) -> Path:
        """The folder of the quantised base that its adapter names. InputError where it is not there."""
        base = lora.base_of(self.folder)
        if not base.is_dir():
            raise InputError(f"{self.folder}: its base {base} is not there; run magellano train {self.profile.name}")
        return base

    @property
    def tokens(self) -> Path:
        """The tokens that it was trained and is measured on. InputError where they are not there."""
        folder = input_folder(self.folder, Stage.TOKENIZE)
        if folder is None:
            raise InputError(f"{self.folder}: its tokens are not there; run magellano train {self.profile.name}")
        return folder


def _folders() -> list[Path]:
    """The releases' folders in the store, oldest first."""
    manifests = (home() / "artifacts" / Stage.CHECKPOINT).glob(f"[!.]*/{MANIFEST}")
    return [path.parent for path in sorted(manifests, key=lambda path: path.stat().st_mtime)]


def _list(releases: list[Release]) -> str:
    return ", ".join(f"{r.folder.name[:8]} ({r.profile.name})" for r in releases)
