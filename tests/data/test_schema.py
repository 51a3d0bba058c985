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


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1, "b": null}'}}
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
        ([USER, ANSWER | {"weight": 0}], Reason.FIELDS),
        ([USER | {"tool_calls": [CALL]}, ANSWER], Reason.FIELDS),
        ([USER, ANSWER | {"tool_calls": [{}]}], Reason.CALL),
        ([USER, ANSWER | {"tool_calls": [{"name": "f", "arguments": "[1]"}]}], Reason.CALL),
        ([USER, ANSWER | {"tool_calls": [{"name": "f", "arguments": "[" * 10_000}]}], Reason.CALL),
        ([USER, ANSWER | {"tool_calls": {"name": "f"}}], Reason.CALL),
        ([USER, ANSWER | {"tool_calls": [{"name": "\ud800"}]}], Reason.SURROGATE),
        ([USER, ANSWER | {"tool_calls": [CALL | {"id": "\ud800"}]}], Reason.SURROGATE),
        ([USER, ANSWER, {"role": "tool", "content": "3", "tool_call_id": "\0"}], Reason.NUL),
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


def said(row: dict[str, Any], format: DataFormat) -> str:
    """The text of a row; what counts stands in brackets, `$` is the end-of-text."""
    parts = formats.segments(row, format)
    return "".join(f"[{s.text}]{'$' * s.ends}" if s.counts else s.text for s in parts)


def test_tool_calls_are_said_and_their_answers_are_context() -> None:
    tools = [{"type": "function", "function": {"name": "add", "parameters": {"a": "number"}}}]
    told = [
        USER, {"role": "assistant", "content": None, "tool_calls": [CALL, {"name": "now", "arguments": {}}]},
        {"role": "tool", "content": "3", "tool_call_id": "1"}, ANSWER | {"tool_calls": [{"name": "now"}]},
    ]  # fmt: skip
    row = {"messages": told, "tools": tools}
    assert reasons(DataFormat.CHAT, row, row | {"tools": None}, row | {"tools": "[]"}) == []
    assert said(row, DataFormat.CHAT) == (
        '### Tools:\n{"type": "function", "function": {"name": "add", "parameters": {"a": "number"}}}\n\n'
        '### User:\nhi\n\n### Assistant:\n[{"name": "add", "arguments": {"a": 1, "b": null}}\n'
        '{"name": "now", "arguments": {}}]$\n\n### Tool:\n3\n\n'
        '### Assistant:\n[hello\n{"name": "now", "arguments": {}}]$'
    )
    assert said(row | {"tools": '[{"x": 1}]'}, DataFormat.CHAT).startswith('### Tools:\n{"x": 1}\n\n### User:')
    for wrong in ("nonsense", '{"a": 1}', [1], 3):
        assert reasons(DataFormat.CHAT, row | {"tools": wrong}) == [(0, "tools", Reason.NOT_TOOLS)]


def test_alpaca_is_a_chat_of_two_turns() -> None:
    row = {"instruction": "Translate.", "input": "bonjour", "output": "hello"}
    assert said(row, DataFormat.ALPACA) == "### User:\nTranslate.\n\nbonjour\n\n### Assistant:\n[hello]$"
    for empty in ({"input": ""}, {"input": None}, {"input": " "}):
        assert said(row | empty, DataFormat.ALPACA) == "### User:\nTranslate.\n\n### Assistant:\n[hello]$"
    assert said(row | {"system": "s"}, DataFormat.ALPACA).startswith("### System:\ns\n\n### User:\nTranslate.")
    rows = [row, row | {"input": 3}, row | {"output": " "}, {"instruction": "a", "output": "b"}, row | {"input": "\0"}]
    assert reasons(DataFormat.ALPACA, *rows) == [
        (1, "input", Reason.NOT_TEXT), (2, "output", Reason.EMPTY), (4, "input", Reason.NUL),
    ]  # fmt: skip


def turns(*pairs: tuple[Any, Any]) -> dict[str, Any]:
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in pairs]}


def test_sharegpt_is_a_chat() -> None:
    row = turns(
        ("system", "s"), ("human", "hi"), ("function_call", '{"name": "add", "arguments": {"a": 1}}'),
        ("observation", "3"), ("gpt", "hello"),
    )  # fmt: skip
    assert reasons(DataFormat.SHAREGPT, row) == []
    assert said(row, DataFormat.SHAREGPT) == (
        '### System:\ns\n\n### User:\nhi\n\n### Assistant:\n[{"name": "add", "arguments": {"a": 1}}]$\n\n'
        "### Tool:\n3\n\n### Assistant:\n[hello]$"
    )
    beside = turns(("human", "hi"), ("gpt", "hello")) | {"system": "s", "tools": '[{"name": "add"}]'}
    assert said(beside, DataFormat.SHAREGPT).startswith('### Tools:\n{"name": "add"}\n\n### System:\ns\n\n### User:')


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (None, Reason.NULL),
        ("hi", Reason.NOT_TURNS),
        ([], Reason.NOT_TURNS),
        ([{"from": "human"}], Reason.NOT_TURNS),
        ([{"role": "user", "content": "x"}], Reason.NOT_TURNS),
        (turns(("alien", "x"), ("gpt", "y"))["conversations"], Reason.ROLE),
        (turns((["human"], "x"), ("gpt", "y"))["conversations"], Reason.ROLE),
        (turns(("human", 3), ("gpt", "y"))["conversations"], Reason.CONTENT),
        (turns(("human", "x"), ("gpt", ""))["conversations"], Reason.EMPTY),
        (turns(("human", "x"))["conversations"], Reason.NO_ANSWER),
        (turns(("human", "x"), ("function_call", "no JSON"))["conversations"], Reason.CALL),
        ([{"from": "human", "value": "x", "weight": 0}], Reason.FIELDS),
    ],
)
def test_sharegpt_faults(value: Any, reason: Reason) -> None:
    fine = turns(("user", "hi"), ("assistant", "hello"))
    rows = reasons(DataFormat.SHAREGPT, fine, {"conversations": value}, fine)
    assert rows == [(1, "conversations", reason)]


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
