"""Schema and formats: which rows are rejected and why, and what of a valid row counts."""

from typing import Any

import pytest

from magellano.data import formats
from magellano.data.formats import Segment
from magellano.data.schema import Reason, validate
from magellano.names import DataFormat
from magellano.tokenizer import Tokenizer


def reasons(format: DataFormat, *rows: dict[str, Any]) -> list[tuple[int, str, Reason]]:
    return [(r.row, r.column, r.reason) for r in validate(list(rows), format)]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, Reason.NULL),
        (float("nan"), Reason.NULL),
        (5, Reason.NOT_TEXT),
        (True, Reason.NOT_TEXT),
        (["a"], Reason.NOT_TEXT),
        ({"a": {"b": None}}, Reason.NOT_TEXT),
        ("", Reason.EMPTY),
        (" \n\t", Reason.EMPTY),
        ("a\0b", Reason.NUL),
        ("a\ud800", Reason.SURROGATE),
    ],
)
def test_text_faults(value: Any, reason: Reason) -> None:
    rows = [{"text": "fine"}, {"text": value}, {"text": "also fine", "more": 1}]
    assert reasons(DataFormat.TEXT, *rows) == [(1, "text", reason)]


def test_a_missing_column_is_null_and_the_first_fault_is_given() -> None:
    rows = [{"prompt": "p", "completion": "c"}, {"prompt": "p"}, {"prompt": 3, "completion": ""}]
    assert reasons(DataFormat.COMPLETIONS, *rows) == [
        (1, "completion", Reason.NULL),
        (2, "prompt", Reason.NOT_TEXT),
    ]


USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (None, Reason.NULL),
        ("hi", Reason.NOT_MESSAGES),
        ([], Reason.NOT_MESSAGES),
        (["hi"], Reason.NOT_MESSAGES),
        ([USER, {"role": "assistant"}], Reason.NOT_MESSAGES),
        ([USER, {"role": "robot", "content": "x"}, ANSWER], Reason.ROLE),
        ([USER, {"role": ["user"], "content": "x"}, ANSWER], Reason.ROLE),
        ([USER, {"role": "assistant", "content": None}], Reason.CONTENT),
        ([USER, {"role": "assistant", "content": ["x"]}], Reason.CONTENT),
        ([USER, {"role": "assistant", "content": " "}], Reason.EMPTY),
        ([{"role": "user", "content": "\0"}, ANSWER], Reason.NUL),
        ([USER, ANSWER | {"tool_calls": [{}]}], Reason.FIELDS),
        ([USER], Reason.NO_ANSWER),
    ],
)
def test_chat_faults(messages: Any, reason: Reason) -> None:
    fine = {"messages": [USER, ANSWER | {"tool_calls": None}, USER]}
    assert reasons(DataFormat.CHAT, fine, {"messages": messages}, fine) == [(1, "messages", reason)]


def test_segments_of_each_format() -> None:
    assert formats.segments({"text": "a", "id": 3}, DataFormat.TEXT) == [Segment("a", counts=True, ends=True)]
    assert formats.segments({"prompt": "p", "completion": "c"}, DataFormat.COMPLETIONS) == [
        Segment("p", counts=False),
        Segment("c", counts=True, ends=True),
    ]
    messages = [{"role": "system", "content": "s"}, USER, ANSWER, USER]
    assert formats.segments({"messages": messages}, DataFormat.CHAT) == [
        Segment("### System:\n", counts=False),
        Segment("s", counts=False),
        Segment("\n\n### User:\n", counts=False),
        Segment("hi", counts=False),
        Segment("\n\n### Assistant:\n", counts=False),
        Segment("hello", counts=True, ends=True),
        Segment("\n\n### User:\n", counts=False),
        Segment("hi", counts=False),
    ]


@pytest.mark.parametrize(
    ("format", "row", "counted"),
    [
        (DataFormat.TEXT, {"text": "abc"}, "abc$"),
        (DataFormat.COMPLETIONS, {"prompt": "abc", "completion": "de"}, "de$"),
        (DataFormat.COMPLETIONS, {"prompt": "", "completion": "de"}, "de$"),
        (DataFormat.CHAT, {"messages": [USER, ANSWER]}, "hello$"),
        (DataFormat.CHAT, {"messages": [USER, ANSWER, USER, ANSWER, USER]}, "hello$hello$"),
    ],
)
def test_only_what_should_count_counts(format: DataFormat, row: dict[str, Any], counted: str) -> None:
    tokenizer = Tokenizer(257)  # bytes, so that the counted text can be read off
    parts = [(s, tokenizer.encode(s.text)) for s in formats.segments(row, format)]
    document = formats.document(parts, tokenizer.end_of_text)
    ids = document.targets[document.counts == 1].tolist()
    assert "".join("$" if i == tokenizer.end_of_text else tokenizer.decode([i]) for i in ids) == counted
    assert document.targets[-1] == tokenizer.end_of_text
    assert len(document.targets) == len(document.counts)
    assert tokenizer.decode(document.targets.tolist()) == "".join(s.text for s, _ in parts)


def test_digest_is_of_content_and_mask() -> None:
    a = formats.digest([Segment("ab", True, True)])
    assert a == formats.digest([Segment("ab", True, True)])
    assert (
        len({a, formats.digest([Segment("ab", False)]), formats.digest([Segment("a", True), Segment("b", True)])}) == 3
    )
