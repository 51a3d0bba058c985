"""magellano benchmark NAME: runs `run() -> dict` of the module magellano.benchmark.NAME."""

import argparse
import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

HELP = "measure one part on this machine"
OF_A_PROFILE = ("train", "generate")
NAMES = ("adamw", "scan", "nf4", "moe", "loss", *OF_A_PROFILE)


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", choices=NAMES, help=", ".join(NAMES))
    parser.add_argument("--profile", metavar="PROFILE", help="whose model trains or generates (demo)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="change one setting, as train.batch=16"
    )
    parser.add_argument("--steps", type=int, metavar="N", help="how many steps or tokens are timed")
    parser.add_argument("--trace", action="store_true", help="train: where a step's time and memory go, with a picture")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from magellano.errors import InputError

    if not available(args.name):
        have = [name for name in NAMES if available(name)]
        raise InputError(f"benchmark {args.name} is not written yet; there is {', '.join(have) or 'none'}")
    work = importlib.import_module(f"magellano.benchmark.{args.name}").run
    facts = {"benchmark": args.name, **work(**_settings(args))}
    return {**facts, "picture": _picture(facts)} if args.trace else facts


def _picture(facts: dict[str, Any]) -> str:
    """Draws the trace into the current folder and returns the file's name; says so where matplotlib is missing."""
    from pathlib import Path

    from magellano import report

    if find_spec("matplotlib") is None:
        return "none: matplotlib is not installed"
    out = Path(f"trace-{facts['profile']}.png")
    report.trace_picture(out, facts["trace"], f"{facts['profile']}, {facts['batch']} x {facts['seq_len']}")
    return str(out)


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """What a benchmark of a whole model is told; those of single operations take nothing."""
    from magellano.errors import InputError
    from magellano.profile import load_profile, parse_override

    if args.trace and args.name != "train":
        raise InputError(f"benchmark {args.name}: --trace belongs to train")
    if args.name not in OF_A_PROFILE:
        if args.profile or args.set or args.steps:
            raise InputError(f"benchmark {args.name}: --profile, --set and --steps belong to {', '.join(OF_A_PROFILE)}")
        return {}
    if args.steps is not None and args.steps < 1:
        raise InputError(f"--steps {args.steps}: must be 1 or more")
    profile = load_profile(args.profile or "demo", dict(map(parse_override, args.set)))
    chosen = {"steps": args.steps or None, "trace": args.trace or None}
    return {"profile": profile, **{key: value for key, value in chosen.items() if value is not None}}


def available(name: str) -> bool:
    """Whether this version has the benchmark."""
    return find_spec("magellano.benchmark") is not None and find_spec(f"magellano.benchmark.{name}") is not None


def show(facts: dict[str, Any], console: "Console") -> None:
    from magellano import report

    rows = {key: value for key, value in facts.items() if not isinstance(value, list | dict)}
    report.facts("Benchmark", rows).show(console)
    for key, value in facts.items():
        if isinstance(value, list) and value and not isinstance(value[0], dict):
            console.print(f"{key.replace('_', ' ')}: {', '.join(map(report.number, value))}")
        elif isinstance(value, list) and value:
            columns = tuple(dict.fromkeys(c for row in value for c in row))  # not every row has every measure
            table = tuple(tuple(report.number(row[c]) if c in row else "" for c in columns) for row in value)
            report.Table(key, columns, table).show(console)
        elif isinstance(value, dict):
            report.facts(key, value).show(console)
