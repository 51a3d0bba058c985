"""magellano nightly PROFILE: the nightly flow in this process, for cron without a server."""

import argparse
from typing import TYPE_CHECKING, Any

from magellano.commands.train import checked_overrides, load_flow, profile_arguments

if TYPE_CHECKING:
    from rich.console import Console

HELP = "fine-tune where something is new, and promote the adapter if it passes the gate"
FLOW = "nightly"


def arguments(parser: argparse.ArgumentParser) -> None:
    profile_arguments(parser)
    parser.add_argument("--force", action="store_true", help="train although nothing is new")


def run(args: argparse.Namespace) -> dict[str, Any]:
    overrides = checked_overrides(args)
    return load_flow(FLOW)(profile=args.profile, overrides=overrides, force=args.force)


def show(facts: dict[str, Any], console: "Console") -> None:
    from magellano import report

    if "nothing_new" in facts:
        console.print(f"no training: {facts['nothing_new']}", highlight=False, markup=False)
        return
    report.show_run(facts, console)
