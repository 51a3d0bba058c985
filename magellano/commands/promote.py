"""magellano promote RUN"""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

HELP = "put a release in force by hand; its own held-out split is the fixed one from then on"


def arguments(parser: argparse.ArgumentParser) -> None:
    from magellano.commands.generate import run_argument

    run_argument(parser)
    parser.add_argument("--reason", default="by hand", help="kept in the registry")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from rich.console import Console

    from magellano import gate
    from magellano.artifacts import Store, home
    from magellano.runs import Release

    release = Release.find(args.run)
    with Console(stderr=True).status("measuring") as status:

        def progress(done: int, total: int, **facts: float | str) -> None:
            status.update(f"measuring the {facts['model']} model: {done} of {total} rows")

        return gate.promote(Store(home()), release, args.reason, progress)


def show(facts: dict[str, Any], console: "Console") -> None:
    from magellano.commands import rollback

    rollback.show(facts, console)
