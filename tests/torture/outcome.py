"""What a part of the plan found: tries, wrong outcomes, seconds; and the table of all."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Row:
    """One fault. `level`: what was driven; `wrong`: one line for each wrong outcome, the first of which are shown."""

    fault: str
    level: str
    tries: int = 0
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    note: str = ""
    skipped: str = ""  # why nothing was tried

    def check(self, holds: object, otherwise: str) -> bool:
        """Note a wrong outcome unless `holds`."""
        if not holds:
            self.wrong.append(otherwise)
        return bool(holds)

    def json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Share:
    """Part of the full plan. A part asks it how often to try."""

    part: float = 1.0
    seed: int = 1

    def of(self, full: int, least: int = 1) -> int:
        return min(full, max(least, round(full * self.part)))

    def spread(self, items: list[Any], least: int) -> list[Any]:
        """Some of `items`, evenly spread: the first and the last are among them."""
        count = self.of(len(items), least)
        return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


Part = Callable[[Share], Iterator[Row]]


def timed(part: Part, share: Share) -> Iterator[Row]:
    """The rows of `part`, each with the seconds it took."""
    started = time.monotonic()
    for row in part(share):
        row.seconds = time.monotonic() - started
        yield row
        started = time.monotonic()


def table(rows: list[Row]) -> str:
    """Markdown: fault, what was driven, tries, wrong outcomes, seconds, and what else is worth knowing."""
    head = ["fault", "driven", "tries", "wrong", "seconds", "note"]
    lines = [head, ["---", "---", "---:", "---:", "---:", "---"]]
    for row in rows:
        note = f"SKIPPED: {row.skipped}" if row.skipped else row.note
        lines.append([row.fault, row.level, f"{row.tries:,}", str(len(row.wrong)), f"{row.seconds:,.0f}", note])
    total, wrong = sum(r.tries for r in rows), sum(len(r.wrong) for r in rows)
    lines.append(["**all**", "", f"{total:,}", str(wrong), f"{sum(r.seconds for r in rows):,.0f}", ""])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
