"""magellano down"""

import argparse
from typing import TYPE_CHECKING, Any

from magellano.commands.up import site_arguments

if TYPE_CHECKING:
    from rich.console import Console

HELP = "end this home's worker, its runs saved first, and its server"


def arguments(parser: argparse.ArgumentParser) -> None:
    site_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    from magellano import site

    parts = [site.Part(args.only)] if args.only else [site.Part.WORKER, site.Part.SERVER]
    said, ended = [], []
    for part in parts:
        found = site.running(part)
        if found is None:
            continue
        if part is site.Part.WORKER and site.healthy(found["url"]):
            # A worker that ends kills its run without a signal (Prefect 3.8.8): its runs are cancelled first, and save.
            said += site.helper("drain", found["url"], found["pool"], str(found["pid"]))
        site.stop(part)
        ended.append(str(part))
    return {"ended": ended, "said": said}


def show(facts: dict[str, Any], console: "Console") -> None:
    for line in facts["said"]:
        console.print(line, highlight=False, markup=False)
    console.print(f"ended: {' and '.join(facts['ended']) or 'nothing: nothing of it ran'}", highlight=False)
