"""magellano runs"""

import argparse
from typing import TYPE_CHECKING, Any

from magellano.names import RunState

if TYPE_CHECKING:
    from rich.console import Console

HELP = "the runs so far: what each was, how it ended, what it took"
WIDE = 110  # columns of a terminal that all of the table needs


def arguments(parser: argparse.ArgumentParser) -> None:
    states = [state.value for state in RunState]
    parser.add_argument("--profile", metavar="NAME", help="of this profile alone")
    parser.add_argument("--flow", metavar="NAME", help="of this flow alone: train, nightly, pretrain, stages")
    parser.add_argument("--state", choices=states, metavar="STATE", help=f"in this state alone: {', '.join(states)}")
    parser.add_argument("--decision", metavar="WORD", help="with this decision of the gate alone, as promoted")
    parser.add_argument("--last", type=int, default=0, metavar="N", help="the last N alone")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from magellano import artifacts, ledger

    found = [
        record
        for record in ledger.records()
        if (args.profile in (None, record.profile) and args.flow in (None, record.flow))
        and args.state in (None, record.state)
        and args.decision in (None, (record.gate or {}).get("decision"))
    ]
    shown = found[-args.last :] if args.last > 0 else found
    return {"home": str(artifacts.home()), "runs": [record.model_dump(mode="json") for record in shown]}


def show(facts: dict[str, Any], console: "Console") -> None:
    from magellano import report

    if not facts["runs"]:
        console.print(f"no such run below {facts['home']}", highlight=False)
        return
    columns = ("run", "what", "UTC", "state", "built", "loss", "took", "energy", "cost")
    shown = len(columns) if console.width >= WIDE else len(columns) - 2
    rows = tuple(_row(run)[:shown] for run in facts["runs"])
    report.Table("Runs", columns[:shown], rows, numbers=False).show(console)
    if shown < len(columns):
        console.print(f"energy and cost: from {WIDE} columns on, or magellano show RUN", highlight=False)


def _row(run: dict[str, Any]) -> tuple[str, ...]:
    from magellano import report

    loss, took = run["numbers"].get("loss"), run["took"]
    built, gate = sum(not stage["reused"] for stage in run["stages"]), run["gate"] or {}
    return (
        str(run["number"]),
        f"{run['flow']} {run['profile']}",
        run["started"][5:16].replace("T", " "),
        gate.get("decision") or run["state"],
        f"{built}/{len(run['stages'])}" if run["stages"] else "",
        f"{loss:.4f}" if loss is not None else "",
        report.duration(took["seconds"]) if took else "",
        report.energy(took) if took else "",
        report.money(took) if took else "",
    )
