"""magellano train PROFILE: the train flow in this process, no server needed."""

import argparse
from typing import TYPE_CHECKING, Any

from magellano.names import Stage

if TYPE_CHECKING:
    from rich.console import Console

HELP = "fine-tune: tokenize, quantize, attach_lora, train, checkpoint, evaluate; finished stages are not run again"
FLOW = "train"
LEAST = 4 << 20  # bytes that the books of a run need, whatever its stages do
STAGES = [stage.value for stage in Stage]


def profile_arguments(parser: argparse.ArgumentParser) -> None:
    """PROFILE and --set, which train, pretrain and plan share."""
    parser.add_argument("profile", metavar="PROFILE", help="a profile's name or file")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one setting, as train.steps=10"
    )


def arguments(parser: argparse.ArgumentParser) -> None:
    profile_arguments(parser)
    parser.add_argument(
        "--rerun",
        action="append",
        default=[],
        choices=STAGES,
        metavar="STAGE",
        help=f"run this stage again ({', '.join(STAGES)})",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from magellano import artifacts, disk

    overrides = checked_overrides(args)
    fine_tune = load_flow(FLOW)
    with disk.told_when_full(artifacts.home(), need=LEAST):  # Prefect's own database may be what finds no room
        return fine_tune(profile=args.profile, overrides=overrides, rerun=args.rerun)


def checked_overrides(args: argparse.Namespace) -> dict[str, Any]:
    """The --set overrides, once the profile has been read with them: bad input ends here, before anything starts."""
    from magellano.profile import load_profile, parse_override

    overrides = dict(map(parse_override, args.set))
    load_profile(args.profile, overrides)
    return overrides


def load_flow(name: str) -> Any:
    """The flow behind the entry point `name`. InputError where the pipeline extra is not installed."""
    from importlib.metadata import entry_points

    from magellano import turns
    from magellano.errors import InputError

    found = entry_points(group="magellano.flows", name=name)
    try:
        if found:
            turns.take()
            return next(iter(found)).load()
        missing = f"no flow {name!r} is installed"
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in {"prefect", "flows", "tasks", "datasets", "pandera", "matplotlib"}:
            raise
        missing = f"the module {error.name!r} is missing"
    raise InputError(f"{missing}: install the pipeline extra, pip install 'scm-magellano[pipeline]', or run make setup")


def show(facts: dict[str, Any], console: "Console") -> None:
    from magellano import report

    report.show_run(facts, console)
