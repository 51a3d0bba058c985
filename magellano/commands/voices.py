"""The adapters that a command may generate with: RUN's own, those of --adapter and --blend, and none."""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from magellano.adapters import Adapters
    from magellano.commands.chosen import Chosen
    from magellano.generate import Context
    from magellano.model import MagellanoLM
    from magellano.runs import Release

RUN, BASE = "run", "base"  # names that are there without being given


def arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    others = f"another release on the same base, to choose as NAME; RUN's own is {RUN!r}, none is {BASE!r}"
    add("--adapter", action="append", default=[], metavar="NAME=RUN", help=others)
    blend = "a weighted sum of adapters, to choose as NAME"
    add("--blend", action="append", default=[], metavar="NAME=A:0.7,B:0.3", help=blend)
    use = f'the adapter to use (default {RUN!r}); in a .jsonl of --prompts a line may name its own: "adapter": NAME'
    add("--use", metavar="NAME", help=use)


@dataclass
class Voice:
    """An adapter's way to speak: the release whose prompts it was trained on, and where a prompt of its goes on."""

    release: "Release | None"
    start: "Context | None" = None
    blend: bool = False


@dataclass
class Voices:
    """Those of a command line; `chosen` alone where it asks for no others."""

    chosen: "Chosen"
    default: str
    model: "MagellanoLM"
    adapters: "Adapters | None" = None
    known: dict[str, Voice] = field(default_factory=dict)

    @classmethod
    def find(cls, chosen: "Chosen", args: argparse.Namespace) -> "Voices":
        """Load what is asked for. InputError where a name means nothing, or a release has another base."""
        default = args.use or RUN
        if not (args.adapter or args.blend or args.use):
            return cls(chosen, default, chosen.model(), None, {RUN: Voice(chosen.release)})
        from magellano import loader
        from magellano.adapters import Adapters
        from magellano.runs import Release

        base = chosen.folder if chosen.release is None else chosen.release.base
        adapters = Adapters(loader.load_model(base), base)
        known = {BASE: Voice(chosen.release), RUN: Voice(chosen.release)}
        if chosen.release is not None:
            adapters.add(RUN, chosen.folder)
        for name, run in map(_named, args.adapter):
            _fresh(name, known)
            release = Release.find(run)
            adapters.add(name, release.folder)
            known[name] = Voice(release)
        for name, sum_ in map(_named, args.blend):
            _fresh(name, known)
            shares = _shares(name, sum_)
            adapters.blend(name, shares)
            known[name] = Voice(known[next(iter(shares))].release, blend=True)
        made = cls(chosen, default, adapters.model, adapters, known)
        made.use(default, "--use")
        return made

    def use(self, name: str, where: str) -> Voice:
        """Put the adapter `name` on. InputError, which names `where` it was asked for, where there is none."""
        from magellano.errors import InputError

        if name not in self.known:
            raise InputError(f"{where}: no adapter {name}; there is {', '.join(self.known)}; load it with --adapter")
        if self.adapters is not None:
            bare = name == BASE or (name == RUN and self.chosen.release is None)
            self.adapters.use(None if bare else name)
        return self.known[name]

    def folders(self) -> list[Path]:
        """All that the model with the adapter in use at first is read from. InputError for a blend, which is in no
        folder.
        """
        from magellano.errors import InputError

        release = self.known[self.default].release
        if self.known[self.default].blend:
            raise InputError(f"--use {self.default}: a state belongs to an adapter in a folder, not to a blend")
        if self.default == RUN or release is None:
            return self.chosen.folders
        if self.default == BASE:
            return [release.base]
        return [release.folder, release.base]


def _named(text: str) -> tuple[str, str]:
    from magellano.errors import InputError

    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise InputError(f"{text}: not of the form NAME=...")
    return name, value


def _fresh(name: str, known: dict[str, Voice]) -> None:
    from magellano.errors import InputError

    if name in known:
        raise InputError(f"{name}: this adapter's name is taken; give another")


def _shares(name: str, text: str) -> dict[str, float]:
    """A:0.7,B:0.3 as a table."""
    from magellano.errors import InputError

    found: dict[str, float] = {}
    for part in text.split(","):
        other, _, share = part.partition(":")
        try:
            value = float(share)
        except ValueError:
            value = float("nan")
        if not other or other in found or not abs(value) < 1e3:
            raise InputError(f"--blend {name}={text}: {part} is not NAME:WEIGHT, once for each, as legal:0.7,plain:0.3")
        found[other] = value
    return found
