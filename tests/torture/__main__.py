"""`make torture`, or `python -m tests.torture`: break what must survive, and print what came of it as a table.

    --share 0.1     a tenth of each part's tries (default: all)
    --minutes 2     as large a share of the short parts as takes about so long on two cores
    --only PART     one part alone, as often as wanted
    --json          a JSON list instead of the table
    --show FILE...  run nothing: the table of what earlier runs printed with --json

Ends with 1 where an outcome was wrong.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import NamedTuple

from tests.torture import cli, contention, damage, faults, kills, network, soak, suites, volume
from tests.torture.outcome import Part, Row, Share, table, timed


class Planned(NamedTuple):
    """`seconds`: what the whole part takes on two cores; `fixed`: what even its smallest share takes. `short`: belongs
    to a share of minutes; the others start the command line again and again, or are in the test suite anyway.
    """

    part: Part
    seconds: float
    fixed: float
    short: bool


PLAN = {
    "kills": Planned(kills.part, 700, 25, True),
    "faults": Planned(faults.part, 40, 8, True),
    "damage": Planned(damage.part, 12, 6, True),
    "contention": Planned(contention.part, 18, 2, True),
    "network": Planned(network.part, 60, 60, False),
    "server": Planned(network.server, 300, 300, False),
    "cli": Planned(cli.part, 900, 150, False),
    "suites": Planned(suites.part, 150, 60, False),
    "volume": Planned(volume.part, 120, 15, False),
    "soak": Planned(soak.part, 600, 20, False),
}


def share_of(minutes: float) -> Share:
    """The share of the short parts that takes `minutes`."""
    short = [p for p in PLAN.values() if p.short]
    left = 60 * minutes - sum(p.fixed for p in short)
    return Share(min(1.0, max(0.0, left / sum(p.seconds - p.fixed for p in short))))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.torture", description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=1.0)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--only", action="append", choices=PLAN, default=[])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--show", nargs="+", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.show:
        print(table([Row(**facts) for path in args.show for facts in json.loads(path.read_text(encoding="utf-8"))]))
        return 0
    share = Share(args.share, args.seed) if args.minutes is None else share_of(args.minutes)
    chosen = args.only or [name for name, planned in PLAN.items() if args.minutes is None or planned.short]
    rows: list[Row] = []
    if sys.platform != "linux":  # forks with MLX loaded, /proc, strace
        print(f"only `suites` runs here: {sorted(set(chosen) - {'suites'})} need Linux", file=sys.stderr)
        chosen = [name for name in chosen if name == "suites"]
    for name in chosen:
        for row in timed(PLAN[name].part, share):
            rows.append(row)
            tell(row)
    print(json.dumps([row.json() for row in rows], indent=2) if args.json else table(rows))
    return int(any(row.wrong for row in rows))


def tell(row: Row) -> None:
    """One line a row as it ends, and its first wrong outcomes."""
    verdict = f"SKIPPED: {row.skipped}" if row.skipped else f"{row.tries:,} tries, {len(row.wrong)} wrong"
    print(f"{row.fault} ({row.level}): {verdict}, {row.seconds:.0f} s", file=sys.stderr, flush=True)
    for line in row.wrong[:5]:
        print(f"    WRONG: {line}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
