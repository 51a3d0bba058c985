"""What a valid row of each format is: one pandera schema per format, and the reason that each rejected row gets."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Any

from magellano.data import limits
from magellano.data.formats import COLUMNS, Role
from magellano.names import DataFormat

if TYPE_CHECKING:
    from pandera.pandas import DataFrameSchema


class Reason(StrEnum):
    """Why a row is rejected. The first that applies is given."""

    NULL = "is missing or null"
    NOT_TEXT = "is not text"
    EMPTY = "is empty or blank"
    NUL = "holds a NUL character"
    LONG = f"is longer than {limits.ROW_BYTES // limits.MIB} MiB"
    BLANKS = f"has a run of more than {limits.BLANK_RUN} blank characters, which the tokenizer cannot split"
    SURROGATE = "holds half a surrogate pair, which is no character"
    NOT_MESSAGES = "is not a list of messages with role and content"
    ROLE = f"has a role other than {', '.join(Role)}"
    CONTENT = "has a message whose content is not text"
    FIELDS = "has a message with more than role and content (tool calls, weights), which would be lost"
    NO_ANSWER = "has no assistant message, so nothing would be learnt"


@dataclass(frozen=True)
class Reject:
    """A row that is left out: `row` is the index in the chunk."""

    row: int
    column: str
    reason: Reason


@dataclass(frozen=True)
class _Cell:
    """A value as pandera sees it. pandera copies a failing value into its messages as text, which half a surrogate pair
    breaks and a text of 100 MB makes dear: this shows the type only."""

    value: Any

    def __str__(self) -> str:
        return f"<{type(self.value).__name__}>"


def text_fault(value: Any, blank: bool = False) -> Reason | None:
    """What is wrong with a column of text; `blank`: it may be empty."""
    if not isinstance(value, str):
        return Reason.NOT_TEXT
    if not blank and not value.strip():
        return Reason.EMPTY
    if "\0" in value:
        return Reason.NUL
    try:
        size = len(value.encode("utf-8"))
    except UnicodeEncodeError:
        return Reason.SURROGATE
    if size > limits.ROW_BYTES:
        return Reason.LONG
    return Reason.BLANKS if limits.blank_run(value) else None


def messages_fault(value: Any) -> Reason | None:
    """What is wrong with a column of chat messages."""
    if not isinstance(value, list) or not value:
        return Reason.NOT_MESSAGES
    for message in value:
        if fault := _message_fault(message):
            return fault
    return None if any(m["role"] == Role.ASSISTANT for m in value) else Reason.NO_ANSWER


def _message_fault(message: Any) -> Reason | None:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        return Reason.NOT_MESSAGES
    if message["role"] not in tuple(Role):
        return Reason.ROLE
    if any(value is not None for key, value in message.items() if key not in ("role", "content")):
        return Reason.FIELDS
    fault = text_fault(message["content"], blank=message["role"] != Role.ASSISTANT)
    return Reason.CONTENT if fault is Reason.NOT_TEXT else fault


_FAULTS: dict[str, tuple[Callable[[Any], Reason | None], tuple[Reason, ...]]] = {
    "text": (text_fault, (Reason.NOT_TEXT, Reason.EMPTY, Reason.NUL, Reason.SURROGATE, Reason.LONG, Reason.BLANKS)),
    "messages": (
        messages_fault,
        (
            Reason.NOT_MESSAGES, Reason.ROLE, Reason.FIELDS, Reason.CONTENT, Reason.EMPTY, Reason.NUL, Reason.SURROGATE,
            Reason.LONG, Reason.BLANKS, Reason.NO_ANSWER,
        ),
    ),
}  # fmt: skip


@cache
def schema(format: DataFormat) -> "DataFrameSchema":
    """The pandera schema of a format: every column required, never null, and one check per reason."""
    import pandera.pandas as pa

    def check(fault: Callable[[Any], Reason | None], reason: Reason) -> pa.Check:
        return pa.Check(lambda cell: fault(cell.value) is not reason, element_wise=True, error=reason.value)

    columns = {}
    for name in COLUMNS[format]:
        fault, reasons = _FAULTS["messages" if name == "messages" else "text"]
        columns[name] = pa.Column(object, [check(fault, reason) for reason in reasons], nullable=False)
    return pa.DataFrameSchema(columns)


def validate(rows: list[dict[str, Any]], format: DataFormat) -> list[Reject]:
    """Check a chunk of rows; returns one Reject per bad row, in the order of the rows."""
    import pandas as pd
    from pandera.errors import SchemaErrors

    # Object columns, so that pandas infers no type and a row's value reaches the checks as it was read.
    frame = pd.DataFrame({c: pd.Series([_cell(row.get(c)) for row in rows], dtype=object) for c in COLUMNS[format]})
    try:
        schema(format).validate(frame, lazy=True)
    except SchemaErrors as errors:
        return _rejects(errors.failure_cases.to_dict("records"))
    return []


def _cell(value: Any) -> _Cell | None:
    """None for a null (a NaN is Parquet's and pandas' null)."""
    return None if value is None or value != value else _Cell(value)


def _rejects(cases: list[dict[str, Any]]) -> list[Reject]:
    """pandera lists every failed check; a row keeps the first."""
    first: dict[int, Reject] = {}
    for case in cases:
        assert case["index"] is not None, f"a check itself failed: {case}"
        reason = Reason.NULL if case["check"] == "not_nullable" else Reason(case["check"])
        first.setdefault(int(case["index"]), Reject(int(case["index"]), str(case["column"]), reason))
    return [first[row] for row in sorted(first)]
