"""magellano benchmark NAME: runs `run() -> dict` of the module magellano.benchmark.NAME."""

import argparse
import importlib
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

HELP = "measure one part on this machine"
NAMES = ("adamw", "scan", "nf4", "moe", "loss", "train", "generate")


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", metavar="NAME", choices=NAMES, help=", ".join(NAMES))


def run(args: argparse.Namespace) -> dict[str, Any]:
    from magellano.errors import InputError

    if not available(args.name):
        have = [name for name in NAMES if available(name)]
        raise InputError(f"benchmark {args.name} is not written yet; there is {', '.join(have) or 'none'}")
    return {"benchmark": args.name, **importlib.import_module(f"magellano.benchmark.{args.name}").run()}


def available(name: str) -> bool:
    """Whether this version has the benchmark."""
    return find_spec("magellano.benchmark") is not None and find_spec(f"magellano.benchmark.{name}") is not None


def show(facts: dict[str, Any], console: "Console") -> None:
    from magellano import report

    rows = {key: value for key, value in facts.items() if not isinstance(value, list | dict)}
    report.facts("Benchmark", rows).show(console)
    for key, value in facts.items():
        if isinstance(value, list) and value:
            columns = tuple(dict.fromkeys(c for row in value for c in row))  # not every row has every measure
            table = tuple(tuple(report.number(row[c]) if c in row else "" for c in columns) for row in value)
            report.Table(key, columns, table).show(console)
        elif isinstance(value, dict):
            report.facts(key, value).show(console)
