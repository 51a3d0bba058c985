"""magellano info [PROFILE]"""

import argparse
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

HELP = "this machine, the back end and why, versions; with a profile also its parameters and memory plan"


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("profile", nargs="?", metavar="PROFILE", help="a profile's name or file")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from magellano import info
    from magellano.profile import load_profile, names

    profile = load_profile(args.profile) if args.profile else None
    from magellano import backend

    facts = {"machine": info.machine(), "backend": backend.describe(), "versions": info.versions(), "profiles": names()}
    if profile is not None:
        from magellano.commands.plan import plan_facts

        facts["plan"] = plan_facts(profile)
    return facts


def show(facts: dict[str, Any], console: "Console") -> None:
    from magellano import report
    from magellano.commands import plan

    machine = {k: v for k, v in facts["machine"].items() if k != "memory_bytes"}
    memory = facts["machine"]["memory_bytes"]
    machine["memory"] = report.size(memory) if memory else "not told by this system"
    versions = {k: v or "not installed" for k, v in facts["versions"].items()}
    for title, rows in (("Machine", machine), ("Back end", facts["backend"]), ("Versions", versions)):
        report.facts(title, rows).show(console)
    if "plan" in facts:
        plan.show(facts["plan"], console)
    else:
        console.print(f"profiles: {', '.join(facts['profiles'])}")
