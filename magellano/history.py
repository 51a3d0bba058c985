"""Which runs' pages on Prefect's server may go: states, logs, tables and pictures, 0.2 MB each. Nothing here knows
Prefect; tasks/prune.py does it. The run's record, its profile and its artifacts are not touched.
"""

import os
from datetime import UTC, datetime, timedelta

from magellano import ledger, registry
from magellano.errors import InputError
from magellano.names import RunState, Stage

DAYS = 90.0
KEEP = 2  # runs of each flow and profile


def keep_days() -> float:
    """After how many days pages go by themselves: MAGELLANO_KEEP_DAYS; 0: never. InputError where it is no number."""
    return days_of(os.environ.get("MAGELLANO_KEEP_DAYS", f"{DAYS:g}"), "MAGELLANO_KEEP_DAYS=")


def days_of(text: str, where: str) -> float:
    """A number of days. InputError naming `where` it was given."""
    if not text.replace(".", "", 1).isdigit() or float(text) > 36500:
        raise InputError(f"{where}{text}: not a number of days; give one, as {DAYS:g}")
    return float(text)


def old(days: float, keep: int = KEEP) -> list[str]:
    """The flow runs of this home that ended so long ago, but for those of adapters that were ever promoted and the last
    of each flow and profile.
    """
    limit = datetime.now(UTC) - timedelta(days=days)
    shelves = registry.read().profiles.values()
    promoted = {key for shelf in shelves for key in shelf.promoted()}
    judged = {entry.run for shelf in shelves for entry in shelf.entries if entry.release in promoted}
    found, newer = [], dict[tuple[str, str], int]()
    for record in reversed(ledger.records()):
        which = (record.flow, record.profile)
        newer[which] = newer.get(which, 0) + 1
        release = record.stage(Stage.CHECKPOINT)
        kept = newer[which] <= keep or record.number in judged or (release is not None and release.ref.key in promoted)
        if not kept and record.state is not RunState.GOING and datetime.fromisoformat(_last(record)) < limit:
            found.append(record.flow_run)
    return found[::-1]


def _last(record: ledger.Record) -> str:
    return record.ended or record.started
