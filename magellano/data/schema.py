"""What a valid row of each format is: one pandera schema per format, and the reason that each rejected row gets."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import TYPE_CHECKING, Any

from magellano.data import limits, shapes
from magellano.data.formats import COLUMNS, columns
from magellano.data.shapes import Role
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
    NOT_TURNS = "is not a list of turns with from and value"
    CALL = "has a tool call without a name, or whose arguments are no object"
    NOT_TOOLS = "is not a list of tools"
    FIELDS = "has a message with more than role, content and tool calls (weights), which would be lost"
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


def messages_fault(value: Any, asks: bool = False) -> Reason | None:
    """What is wrong with a column of chat messages; `asks`: it need not hold an answer."""
    if not isinstance(value, list) or not value:
        return Reason.NOT_MESSAGES
    for message in value:
        if fault := _message_fault(message):
            return fault
    return None if asks or any(m["role"] == Role.ASSISTANT for m in value) else Reason.NO_ANSWER


def asked_fault(value: Any) -> Reason | None:
    """What is wrong with the prompt of a pair: text or messages."""
    return messages_fault(value, asks=True) if isinstance(value, list) else text_fault(value)


def answer_fault(value: Any) -> Reason | None:
    """What is wrong with an answer of a pair: text or messages."""
    return messages_fault(value) if isinstance(value, list) else text_fault(value)


def _message_fault(message: Any) -> Reason | None:
    if not isinstance(message, dict) or not {"role", "content"} <= message.keys():
        return Reason.NOT_MESSAGES
    role, content, calls = message["role"], message["content"], message.get("tool_calls")
    if role not in tuple(Role):
        return Reason.ROLE
    known = ("role", "content", *(("tool_calls",) if role == Role.ASSISTANT else ()))
    known += shapes.IDENTIFIERS if role == Role.TOOL else ()
    if any(value is not None for key, value in message.items() if key not in known):
        return Reason.FIELDS
    if calls and (fault := _calls_fault(calls)):
        return fault
    named = shapes.identifiers(message) if role == Role.TOOL else ()
    if fault := next(filter(None, (text_fault(value, blank=True) for _, value in named)), None):
        return fault
    if calls and content is None:
        return None
    fault = text_fault(content, blank=role != Role.ASSISTANT or bool(calls))
    return Reason.CONTENT if fault is Reason.NOT_TEXT else fault


def _calls_fault(calls: Any) -> Reason | None:
    made = [shapes.call(call) for call in calls] if isinstance(calls, list) else [None]
    texts = [call.text + call.id for call in made if call is not None]
    return next(filter(None, map(text_fault, texts)), None) if len(texts) == len(made) else Reason.CALL


def conversations_fault(value: Any) -> Reason | None:
    """What is wrong with a column of ShareGPT's turns."""
    if not isinstance(value, list) or not value:
        return Reason.NOT_TURNS
    if not all(isinstance(entry, dict) and {"from", "value"} <= entry.keys() for entry in value):
        return Reason.NOT_TURNS
    return messages_fault([shapes.turn(entry) for entry in value])


def tools_fault(value: Any) -> Reason | None:
    """What is wrong with a column of tools."""
    found = shapes.tools(value)
    return Reason.NOT_TOOLS if found is None else text_fault(shapes.compact(found), blank=True)


def _blank_fault(value: Any) -> Reason | None:
    return text_fault(value, blank=True)


Fault = Callable[[Any], Reason | None]
_TEXT = (Reason.NOT_TEXT, Reason.EMPTY, Reason.NUL, Reason.SURROGATE, Reason.LONG, Reason.BLANKS)
_MESSAGES = (
    Reason.NOT_MESSAGES, Reason.NOT_TURNS, Reason.ROLE, Reason.FIELDS, Reason.CALL, Reason.CONTENT, *_TEXT[1:],
    Reason.NO_ANSWER,
)  # fmt: skip
_FAULTS: dict[str, tuple[Fault, tuple[Reason, ...]]] = {  # of columns that are not text
    "messages": (messages_fault, _MESSAGES),
    "conversations": (conversations_fault, _MESSAGES),
    "tools": (tools_fault, (Reason.NOT_TOOLS, *_TEXT[1:])),
    "input": (_blank_fault, _TEXT),
    "system": (_blank_fault, _TEXT),
}
_OF_PAIRS: dict[str, tuple[Fault, tuple[Reason, ...]]] = {
    "prompt": (asked_fault, (Reason.NOT_TEXT, *_MESSAGES)),
    "chosen": (answer_fault, (Reason.NOT_TEXT, *_MESSAGES)),
    "rejected": (answer_fault, (Reason.NOT_TEXT, *_MESSAGES)),
}


@cache
def schema(format: DataFormat) -> "DataFrameSchema":
    """The pandera schema of a format: its columns, never null but for optional ones, and one check per reason."""
    import pandera.pandas as pa

    def check(fault: Callable[[Any], Reason | None], reason: Reason) -> pa.Check:
        return pa.Check(lambda cell: fault(cell.value) is not reason, element_wise=True, error=reason.value)

    made = {}
    for name in columns(format):
        known = _FAULTS | (_OF_PAIRS if format is DataFormat.PREFERENCE else {})
        fault, reasons = known.get(name, (text_fault, _TEXT))
        optional = name not in COLUMNS[format]
        made[name] = pa.Column(object, [check(fault, reason) for reason in reasons], nullable=optional)
    return pa.DataFrameSchema(made)


def validate(rows: list[dict[str, Any]], format: DataFormat) -> list[Reject]:
    """Check a chunk of rows; returns one Reject per bad row, in the order of the rows."""
    import pandas as pd
    from pandera.errors import SchemaErrors

    # Object columns, so that pandas infers no type and a row's value reaches the checks as it was read.
    frame = pd.DataFrame({c: pd.Series([_cell(row.get(c)) for row in rows], dtype=object) for c in columns(format)})
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
