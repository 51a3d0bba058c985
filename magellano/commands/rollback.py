"""magellano rollback [PROFILE|KEY]"""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

HELP = "put an earlier promoted adapter in force again"


def arguments(parser: argparse.ArgumentParser) -> None:
    what = (
        "a profile (the adapter before its present one) or the start of a key; may be left out if one profile has any"
    )
    parser.add_argument("what", nargs="?", metavar="PROFILE|KEY", help=what)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from magellano import registry
    from magellano.artifacts import home
    from magellano.names import Stage
    from magellano.runs import Release

    def usable(key: str) -> None:
        folder = home() / "artifacts" / Stage.CHECKPOINT / key
        assert Release.read(folder).base

    return registry.roll_back(args.what, usable)


def show(facts: dict[str, Any], console: "Console") -> None:
    before = (facts["before"] or "none")[:8]
    console.print(f"{facts['profile']}: {facts['release'][:8]} is in force, before it was {before}", highlight=False)
    console.print(f"  {facts['registry']}", soft_wrap=True, highlight=False, markup=False)
