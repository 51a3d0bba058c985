"""magellano gc"""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

HELP = "what may go from the home, and old pages from its server: nothing promoted, recent or needed; --yes removes it"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--yes", action="store_true", help="remove it; without, it is only listed")
    parser.add_argument("--keep", type=int, default=2, metavar="N", help="runs kept of each profile and flow (2)")
    parser.add_argument(
        "--pages",
        default="90",
        metavar="DAYS",
        help="pages of Prefect's that may go: of runs that ended so long ago (90)",
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from magellano import gc, history
    from magellano.artifacts import Store, home

    days = history.days_of(args.pages, "--pages ")
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
        "pages": _pages(days, args.keep, args.yes),
    }


def _pages(days: float, keep: int, really: bool) -> int | None:
    """Of how many runs Prefect's pages may go, or went; None where no server of this home answers."""
    import json
    import os

    from magellano import site

    server = site.running(site.Part.SERVER)
    api = os.environ.get("PREFECT_API_URL") or (server["url"] if server else None)
    if api is None or not site.healthy(api):
        return None
    said = site.helper("prune", api, f"{days:g}", str(keep), "yes" if really else "no")
    return int(json.loads(said[-1])["runs"])


def show(facts: dict[str, Any], console: "Console") -> None:
    from pathlib import Path

    from magellano import report

    if facts["pages"]:
        went = "went" if facts["removed"] else "may go"
        console.print(f"Prefect's pages of {facts['pages']} runs {went}", highlight=False)
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
