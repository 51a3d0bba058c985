"""magellano tco: this machine against rented ones over years."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

HELP = "what this machine costs over three years against cloud instances, with the formula"
CLAIMED = {"machine": 3200, "cloud": 11770, "years": 3}  # dollars; what has been claimed for this project


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--years", type=float, default=3.0, help="how long (default 3)")
    parser.add_argument("--hours", type=float, default=8.0, help="of training a day on this machine (default 8)")
    parser.add_argument(
        "--prices", type=Path, metavar="FILE", help="a prices file (default: HOME/prices.toml, or ours)"
    )


def run(args: argparse.Namespace) -> dict[str, Any]:
    from magellano import prices, tco
    from magellano.errors import InputError

    if not 0 <= args.hours <= 24 or not args.years > 0:
        raise InputError(f"--hours {args.hours:g} --years {args.years:g}: give hours from 0 to 24 and years above 0")
    path = args.prices or prices.found()
    known = prices.load(path)
    return {**tco.compare(known, args.years, args.hours), "claimed": _claimed(known, args.years), "prices": str(path)}


def _claimed(known: Any, years: float) -> dict[str, Any]:
    """The claimed sums, and what they would mean: hours a day of each instance, and machine and power."""
    days = 365 * CLAIMED["years"]
    hours = {
        i.name: (CLAIMED["cloud"] - 12 * CLAIMED["years"] * i.storage_per_month) / days / i.per_hour
        for i in known.instance
    }
    return {**CLAIMED, "ratio": CLAIMED["cloud"] / CLAIMED["machine"], "cloud_hours_per_day": hours}


def show(facts: dict[str, Any], console: "Console") -> None:
    from magellano import report

    rows = [(o["name"], *(f"{o[k]:,.0f}" for k in ("fixed", "running", "total")), _times(o)) for o in facts["options"]]
    title = f"{facts['years']:g} years, {facts['hours_per_day']:g} hours of training a day, {facts['currency']}"
    columns = ("", "fixed", "running", "total", "against the machine")
    report.Table(title, columns, tuple(rows)).show(console)
    for option in facts["options"]:
        console.print(f"  {option['name']}:\n    {option['formula']}", soft_wrap=True, highlight=False, markup=False)
    for option in facts["options"][1:]:
        said = (
            f"the machine is cheaper from {option['even_hours']:.1f} hours a day"
            if option["even_hours"]
            else "never even"
        )
        console.print(f"  against {option['name']}: {said}", soft_wrap=True, highlight=False)
    claimed = facts["claimed"]
    console.print(
        f"claimed for {claimed['years']} years: {claimed['machine']:,} against {claimed['cloud']:,} dollars "
        f"({claimed['ratio']:.1f} times), without the inputs; {claimed['cloud']:,} dollars would be",
        highlight=False,
    )
    for name, hours in claimed["cloud_hours_per_day"].items():
        console.print(f"  {hours:.1f} hours a day of {name}", soft_wrap=True, highlight=False)
    report.show_places({"prices": Path(facts["prices"])}, console)


def _times(option: dict[str, Any]) -> str:
    return f"{option['ratio']:.2f} times" if option["ratio"] is not None else ""
