"""magellano pretrain PROFILE: the pretrain flow in this process."""

import argparse
from typing import TYPE_CHECKING, Any

from magellano.commands.train import checked_overrides, load_flow, profile_arguments

if TYPE_CHECKING:
    from rich.console import Console

HELP = "train a base in full by the profile's [pretrain] section, so that a fine-tune has something to stand on"
FLOW = "pretrain"


def arguments(parser: argparse.ArgumentParser) -> None:
    profile_arguments(parser)
    parser.add_argument("--rerun", action="store_true", help="train it again although it is there")


def run(args: argparse.Namespace) -> dict[str, Any]:
    overrides = checked_overrides(args)
    return load_flow(FLOW)(profile=args.profile, overrides=overrides, rerun=args.rerun)


def show(facts: dict[str, Any], console: "Console") -> None:
    from magellano import report

    report.show_run(facts, console)
