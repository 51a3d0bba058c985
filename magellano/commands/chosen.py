"""The model that RUN means on the command line: a release on its base, or any model folder."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from magellano.runs import Release

if TYPE_CHECKING:
    from magellano.data.template import Template
    from magellano.model import MagellanoLM
    from magellano.tokenizer import Tokenizer


@dataclass(frozen=True)
class Chosen:
    """`folder` is the release's or the model's; a release's base is beside it."""

    folder: Path
    release: Release | None

    @classmethod
    def find(cls, run: str) -> "Chosen":
        """What `Release.find` finds, or the folder of a model without an adapter. InputError where there is neither."""
        from magellano import loader, lora

        folder = Path(run)
        if folder.is_dir() and not (folder / lora.CONFIG).is_file() and (folder / loader.CONFIG).is_file():
            return cls(folder.resolve(), None)
        return cls.of(Release.find(run))

    @classmethod
    def of(cls, release: Release) -> "Chosen":
        return cls(release.folder, release)

    @property
    def folders(self) -> list[Path]:
        """All that the model is read from."""
        return [self.folder] if self.release is None else [self.folder, self.release.base]

    def model(self, compute: str = "auto") -> "MagellanoLM":
        from magellano import loader

        if self.release is None:
            return loader.load_model(self.folder, compute)
        return loader.load_release(self.folder, self.release.base, compute)

    def template(self) -> "Template | None":
        """The chat template that it was trained with; None where that is ours. InputError where it was not kept."""
        from magellano.data.template import Template
        from magellano.errors import InputError

        found = Template.kept(self.folder)
        if found is None and self.release is not None and self.release.profile.data.template:
            raise InputError(
                f"{self.folder}: trained on conversations by {self.release.profile.data.template}, which this release "
                f"is too old to hold; magellano train {self.release.profile.name} makes one that does"
            )
        return found

    def tokenizer(self) -> "Tokenizer":
        from magellano.tokenizer import Tokenizer

        return Tokenizer.load(self.folder)
