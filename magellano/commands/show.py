"""magellano show RUN"""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

HELP = "all about one run: what was asked, what it was made of, its stages, numbers, gate and cost"


def run_argument(parser: argparse.ArgumentParser, name: str = "run") -> None:
    """RUN, as runs, show and diff mean it."""
    parser.add_argument(name, metavar="RUN", help="a run's number, or a profile's name for its newest run")


def arguments(parser: argparse.ArgumentParser) -> None:
    run_argument(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from magellano import ledger, lineage
    from magellano.artifacts import Store, home

    record = ledger.find(args.run)
    store = Store(home())
    places = {(s.ref.stage, s.ref.key): s for s in record.stages}
    made_from = {
        f"{stage}/{key}": [f"{ref.stage}/{ref.key}" for ref in lineage.inputs(store, (stage, key)).values()]
        for stage, key in places
    }
    there = {f"{stage}/{key}": store.path(s.ref).is_dir() for (stage, key), s in places.items()}
    folder = home() / "runs" / str(record.number)
    return {
        **record.model_dump(mode="json"), "made_from": made_from, "there": there, "folder": str(folder),
        "profile_file": str(folder / f"{record.profile}.toml"),
        "lock_file": str(folder.parent / "locks" / f"{record.lock}.txt"),
    }  # fmt: skip


def show(facts: dict[str, Any], console: "Console") -> None:
    from pathlib import Path

    from magellano import report

    title = f"Run {facts['number']}: {facts['flow']} {facts['profile']}, {facts['state']}"
    commit = facts["code"]["commit"]
    code = (
        f"{facts['code']['version']}, commit {commit or 'unknown'}{' and changes' if facts['code']['changed'] else ''}"
    )
    rows = {"said": facts["why"], "started": facts["started"], "ended": facts["ended"] or "not yet"}
    rows |= {"attempts": facts["attempts"], "asked": facts["asked"], "code": code}
    if facts["took"]:
        rows["took"] = report.took(facts["took"])
    report.facts(title, {k: v for k, v in rows.items() if v not in ("", None)}).show(console)
    stages = [_stage(stage, facts) for stage in facts["stages"]]
    if stages:
        columns = ("stage", "", "time", "key", "made from")
        report.Table("Stages", columns, tuple(stages), numbers=False).show(console)
    if facts["data"]:
        report.facts("Data files", {name: digest[:16] for name, digest in facts["data"].items()}).show(console)
    if facts["numbers"]:
        report.facts("Numbers", facts["numbers"]).show(console)
    if facts["gate"]:
        console.print(f"[bold]{facts['gate']['decision']}[/bold]: {facts['gate']['reason']}", highlight=False)
    places = {"profile": facts["profile_file"], "lock": facts["lock_file"], "record": facts["folder"]}
    report.show_places({name: Path(path) for name, path in places.items()}, console)


def _stage(stage: dict[str, Any], facts: dict[str, Any]) -> tuple[str, ...]:
    from magellano import report

    place = f"{stage['ref']['stage']}/{stage['ref']['key']}"
    made_from = ", ".join(f"{name.split('/')[0]} {name.split('/')[1][:8]}" for name in facts["made_from"][place])
    state = "reused" if stage["reused"] else "built"
    if not facts["there"][place]:
        state += ", removed since"
    return stage["name"], state, report.duration(stage["seconds"]), stage["ref"]["key"][:8], made_from
