"""JSON records in prompts as TOON (Token-Oriented Object Notation, specification 4.4, github.com/toon-format/spec),
which says the same in fewer tokens where records are alike. By the specification's own package, `toon-format`.

A record is a JSON object, or an array with objects or arrays in it, that begins a line, alone or behind `LABEL: `, and
ends one. What TOON would not give back equal (as a number beyond a double) stays JSON and is counted; an object with a
name twice is no record.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from magellano.data import limits

FAILURES = 20  # beginnings in one text that turn out to be no JSON: each may cost a look at all that follows
_START = re.compile(r"^(?P<label>[^\n{\[]*:[ \t]+)?(?=[{\[])", re.MULTILINE)
_END = re.compile(r"[ \t\r]*(?:\n|\Z)")
_FENCE = "```json\n"


@dataclass(frozen=True)
class Record:
    """One record, as it stood and as it stands; `toon` is empty where it stayed JSON."""

    json: str
    toon: str


def rendered(text: str) -> tuple[str, list[Record]]:
    """`text` with its records in TOON, and the records."""
    made: list[str] = []
    records: list[Record] = []
    done = failures = 0
    left = limits.TOON_VALUES
    while failures < FAILURES and (start := _START.search(text, done)):
        at = start.end()
        found = _record(text, at, left)
        if found is None:
            failures += 1
            after = text.find("\n", at)
            if after < 0:
                break
            made.append(text[done : after + 1])
            done = after + 1
            continue
        end, record = found
        records.append(record)
        left -= _values(record.json)
        before = text[done:at]
        if record.toon:
            fenced = before.endswith(_FENCE)
            before = before[: -len(_FENCE)] + "```toon\n" if fenced else before
            before = before.rstrip(" \t") + "\n" if start["label"] else before
        made += [before, record.toon or record.json]
        done = end
    return "".join([*made, text[done:]]), records


def _record(text: str, at: int, most: int) -> tuple[int, Record] | None:
    """Where the record at `at` ends, and the record, which stays JSON with more than `most` values; None for none."""
    try:
        value, end = _DECODER.raw_decode(text, at)
        if not _END.match(text, end) or not _is_record(value):
            return None
    except (ValueError, RecursionError):
        return None
    spelled = text[at:end]
    return end, Record(spelled, _toon(value) if _values(spelled) <= most else "")


def _values(spelled: str) -> int:
    """At least as many as there are."""
    return 1 + sum(map(spelled.count, ",[{"))


def _is_record(value: Any) -> bool:
    return bool(value) and (isinstance(value, dict) or any(isinstance(x, dict | list) for x in value))


def _toon(value: Any) -> str:
    """`value` in TOON, or nothing where it would not come back equal."""
    import toon_format

    try:
        made = toon_format.dumps(value)
        return made if toon_format.loads(made) == value else ""
    except (ValueError, RecursionError):
        return ""


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        raise ValueError("a name twice")
    return made


def _no_constant(text: str) -> Any:
    raise ValueError(text)  # NaN and Infinity are no JSON


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_constant)
