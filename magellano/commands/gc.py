"""magellano gc"""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

HELP = "what may go from the home: nothing promoted, of the last runs, or needed by these; removes it with --yes"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yes", action="store_true", help="remove it; without, it is only listed")
    parser.add_argument("--keep", type=int, default=2, metavar="N", help="runs kept of each profile and flow (2)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from magellano import gc
    from magellano.artifacts import Store, home

    items = gc.plan(args.keep)
    reasons = gc.kept(Store(home()), args.keep)
    if args.yes:
        gc.remove(items)
    going = [{"path": str(i.path), "why": i.why, "bytes": i.bytes, "age_s": round(i.age)} for i in items]
    kept = {f"{stage}/{key}": why for (stage, key), why in sorted(reasons.items())}
    return {
        "home": str(home()),
        "removed": args.yes,
        "bytes": sum(i.bytes for i in items),
        "items": going,
        "kept": kept,
    }


def show(facts: dict[str, Any], console: "Console") -> None:
    from pathlib import Path

    from magellano import report

    home = Path(facts["home"])
    rows = [(str(Path(i["path"]).relative_to(home)), report.size(i["bytes"]), i["why"]) for i in facts["items"]]
    if not rows:
        console.print(f"nothing may go from {home}; {len(facts['kept'])} artifacts are kept", highlight=False)
        return
    report.Table(f"What {'went' if facts['removed'] else 'may go'}", ("folder", "size", "why"), tuple(rows)).show(
        console
    )
    size = report.size(facts["bytes"])
    said = f"{size} went" if facts["removed"] else f"{size} may go; magellano gc --yes removes it"
    console.print(f"{said}; {len(facts['kept'])} artifacts are kept", highlight=False)
