"""magellano evaluate RUN"""

import argparse
import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from magellano.harness import Tasks
    from magellano.progress import Progress
    from magellano.runs import Release

HELP = "measure a release against its base on its held-out split, and on tasks of lm-eval"
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE", "TRANSFORMERS_OFFLINE")


def arguments(parser: argparse.ArgumentParser) -> None:
    from magellano.commands.generate import run_argument

    run_argument(parser)
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where to write (default: HOME/evaluations/KEY)")
    tasks = parser.add_argument_group("tasks of lm-eval, offline; its own files lie below lm-eval/ in that folder")
    tasks.add_argument("--tasks", default="", metavar="NAME[,NAME...]", help="names of tasks or groups")
    tasks.add_argument("--tasks-from", type=Path, metavar="FOLDER", help="where their YAML files are")
    tasks.add_argument("--limit", type=int, metavar="N", help="the first N samples of each task alone")
    tasks.add_argument("--shots", type=int, metavar="N", help="worked examples in a prompt")


def run(args: argparse.Namespace) -> dict[str, Any]:
    import json

    from rich.console import Console

    from magellano import durable, report
    from magellano.artifacts import home
    from magellano.runs import Release

    release = Release.find(args.run)
    tokens, base = release.tokens, release.base
    tasks = _tasks(args)
    from magellano.stages import evaluate

    out = args.out or home() / "evaluations" / release.folder.name
    durable.private_folder(out)
    with Console(stderr=True).status("evaluating") as status:

        def progress(done: int, total: int, **facts: float | str) -> None:
            status.update(f"evaluating the {facts['model']} model: {done} of {total} {facts.get('of', 'rows')}")

        evaluate.run(out, release.profile, release.folder, tokens, base, progress)
        if tasks is not None:
            _score_tasks(out, release, tasks, args, progress)
    if args.out is None:
        durable.private_files(out)
    evaluation = json.loads((out / report.EVALUATION_JSON).read_text(encoding="utf-8"))
    return {**evaluation, "release": str(release.folder), "out": str(out)}


def _tasks(args: argparse.Namespace) -> "Tasks | None":
    """What --tasks names, loaded before anything long begins. InputError where that cannot be."""
    from magellano.errors import InputError

    names = [name.strip() for name in args.tasks.split(",") if name.strip()]
    given = [f"--{key.replace('_', '-')}" for key in ("tasks_from", "limit", "shots") if getattr(args, key) is not None]
    if not names:
        if given or args.tasks:
            raise InputError(f"{' '.join(given) or '--tasks'}: no task is named; give --tasks NAME[,NAME...]")
        return None
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit {args.limit}: give a limit of 1 or more, or leave it out for all samples")
    if args.shots is not None and args.shots < 0:
        raise InputError(f"--shots {args.shots}: give 0 or more, or leave it out for what a task says")
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError("--tasks: lm_eval is not installed; make peers, or pip install -r requirements-peers.lock")
    os.environ.update(dict.fromkeys(OFFLINE, "1"), TQDM_DISABLE="1")  # before anything reads them
    from magellano.harness import Tasks

    return Tasks(names, args.tasks_from)


def _score_tasks(out: Path, release: "Release", tasks: "Tasks", args: argparse.Namespace, progress: "Progress") -> None:
    """Both models on the tasks, one at a time in memory: lm-eval's files, and a table in our report."""
    import json

    from magellano import harness, loader, report, task_scores
    from magellano.backend import mx
    from magellano.tokenizer import Tokenizer

    profile, folder, results = release.profile, out / "lm-eval", []
    compute, batch = profile.train.compute, profile.evaluate.batch
    for name, load in (
        ("base", lambda: loader.load_model(release.base, compute)),
        ("fine-tuned", lambda: loader.load_release(release.folder, release.base, compute)),
    ):
        mx.clear_cache()
        adapter = harness.Adapter(load(), Tokenizer.load(release.base), batch, progress, name)
        results.append(harness.run(adapter, tasks, folder, args.limit, args.shots))
        del adapter
    rows = harness.compare(*results)
    path = out / report.EVALUATION_JSON
    evaluation = json.loads(path.read_text(encoding="utf-8"))
    evaluation["tasks"] = rows
    text = json.dumps(evaluation, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    with (out / report.EVALUATION_MD).open("a", encoding="utf-8") as page:
        page.write(f"\n{task_scores.table(rows).markdown()}")


def show(facts: dict[str, Any], console: "Console") -> None:
    from magellano import preference, report

    report.show_evaluation(facts, console)
    if (pairs := preference.table(facts)).rows:
        pairs.show(console)
    places = {"release": Path(facts["release"]), "evaluation": Path(facts["out"])}
    if "tasks" in facts:
        from magellano import task_scores

        task_scores.table(facts["tasks"]).show(console)
        places["lm-eval's results"] = Path(facts["out"]) / "lm-eval"
    report.show_places(places, console)
