"""magellano evaluate RUN"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

HELP = "measure a release against its base on its held-out split"


def arguments(parser: argparse.ArgumentParser) -> None:
    from magellano.commands.generate import run_argument

    run_argument(parser)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (default: HOME/evaluations/KEY)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    import json

    from rich.console import Console

    from magellano import durable, report
    from magellano.artifacts import home
    from magellano.runs import Release

    release = Release.find(args.run)
    tokens, base = release.tokens, release.base
    from magellano.stages import evaluate

    out = args.out or home() / "evaluations" / release.folder.name
    durable.private_folder(out)
    with Console(stderr=True).status("evaluating") as status:

        def progress(done: int, total: int, **facts: float | str) -> None:
            status.update(f"evaluating the {facts['model']} model: {done} of {total} rows")

        evaluate.run(out, release.profile, release.folder, tokens, base, progress)
    if args.out is None:
        durable.private_files(out)
    evaluation = json.loads((out / report.EVALUATION_JSON).read_text(encoding="utf-8"))
    return {**evaluation, "release": str(release.folder), "out": str(out)}


def show(facts: dict[str, Any], console: "Console") -> None:
    from magellano import preference, report

    report.show_evaluation(facts, console)
    if (pairs := preference.table(facts)).rows:
        pairs.show(console)
    report.show_places({"release": Path(facts["release"]), "evaluation": Path(facts["out"])}, console)
