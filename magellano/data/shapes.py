"""The shapes in which people keep conversations, read into one: messages of role, content and tool calls, and tools.

chat      {messages: [{role, content, tool_calls?}, ...], tools?}                OpenAI's
alpaca    {instruction, input?, output, system?}                                 one question, one answer
sharegpt  {conversations: [{from, value}, ...], system?, tools?}                 with function_call and observation
preference  {prompt, chosen, rejected, tools?}, each a list of messages          two answers to one prompt

A tool call is {name, arguments}, alone or as OpenAI's {type, id, function: {name, arguments}}; arguments are an object
or its JSON. `tools` is a list of objects or its JSON. In Parquet keep both as JSON: Arrow gives all rows of a
struct the same fields, and those that a row lacks would be nulls in its text.
"""

import json
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

from magellano.data import limits, parse
from magellano.errors import InputError
from magellano.names import DataFormat


class Role(StrEnum):
    """Who speaks in a chat."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"
    TOOL = "tool"  # what a tool answered


SPEAKERS = {
    "human": Role.USER, "user": Role.USER, "gpt": Role.ASSISTANT, "assistant": Role.ASSISTANT,
    "function_call": Role.ASSISTANT, "observation": Role.TOOL, "tool": Role.TOOL, "system": Role.SYSTEM,
}  # fmt: skip
IDENTIFIERS = ("tool_call_id", "name", "id")  # say which call a tool answers: for chat templates; not in our own text


@dataclass(frozen=True)
class Call:
    """A tool call."""

    name: str
    arguments: dict[str, Any]
    id: str = ""

    @property
    def text(self) -> str:
        return compact({"name": self.name, "arguments": self.arguments})


@dataclass(frozen=True)
class Message:
    role: Role
    content: str
    calls: tuple[Call, ...] = ()
    answers: tuple[tuple[str, str], ...] = ()  # of a tool's message: its identifiers by name
    learnt: bool = True  # of the assistant's: whether it counts

    @property
    def text(self) -> str:
        """The content, and each call on a line of its own."""
        return "\n".join([*([self.content] if self.content or not self.calls else []), *(c.text for c in self.calls)])


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...] = field(default=())


def compact(value: Any) -> str:
    """JSON in one line, its spaces as people write them."""
    return json.dumps(value, ensure_ascii=False)


def conversation(row: dict[str, Any], format: DataFormat) -> Conversation:
    """What a row that `schema` has found valid says."""
    match format:
        case DataFormat.ALPACA:
            asked = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part and part.strip())
            said = [{"role": Role.USER, "content": asked}, {"role": Role.ASSISTANT, "content": row["output"]}]
        case DataFormat.SHAREGPT:
            said = [turn(entry) for entry in row["conversations"]]
        case _:
            said = row["messages"]
    if format is not DataFormat.CHAT and (row.get("system") or "").strip():
        said = [{"role": Role.SYSTEM, "content": row["system"]}, *said]
    return Conversation(tuple(map(_message, said)), tuple(tools(row.get("tools")) or ()))


def answered(row: dict[str, Any], which: str) -> Conversation:
    """The prompt of a preference row of messages with its answer `which`, which alone counts."""
    asked = (replace(_message(message), learnt=False) for message in row["prompt"])
    return Conversation((*asked, *map(_message, row[which])), tuple(tools(row.get("tools")) or ()))


def turn(entry: dict[str, Any]) -> dict[str, Any]:
    """An entry of ShareGPT as a message; what is not known of it stays, for the checks to find."""
    rest = {key: value for key, value in entry.items() if key not in ("from", "value")}
    speaker, value = entry["from"], entry["value"]
    role = SPEAKERS.get(speaker, speaker) if isinstance(speaker, str) else speaker
    if speaker == "function_call":
        made = _json(value) if isinstance(value, str) else value
        return rest | {"role": role, "content": "", "tool_calls": made if isinstance(made, list) else [made]}
    return rest | {"role": role, "content": value}


def call(value: Any) -> Call | None:
    """A tool call, or None where `value` is none."""
    inner = value.get("function", value) if isinstance(value, dict) else None
    if not isinstance(inner, dict) or not isinstance(name := inner.get("name"), str) or not name.strip():
        return None
    arguments, id = inner.get("arguments"), value.get("id")
    if arguments is None or (isinstance(arguments, str) and not arguments.strip()):
        arguments = {}
    arguments = _json(arguments) if isinstance(arguments, str) else arguments
    return Call(name, arguments, id if isinstance(id, str) else "") if isinstance(arguments, dict) else None


def identifiers(message: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """Which call a tool's message answers, by the names that templates know."""
    return tuple((key, message[key]) for key in IDENTIFIERS if isinstance(message.get(key), str))


def tools(value: Any) -> list[dict[str, Any]] | None:
    """A list of tools, or None where `value` is none."""
    found = (_json(value) if value.strip() else []) if isinstance(value, str) else [] if value is None else value
    return found if isinstance(found, list) and all(isinstance(tool, dict) for tool in found) else None


def _message(message: dict[str, Any]) -> Message:
    made = [call(value) for value in message.get("tool_calls") or ()]
    calls, role = tuple(c for c in made if c is not None), Role(message["role"])
    return Message(role, message["content"] or "", calls, identifiers(message) if role is Role.TOOL else ())


def _json(text: str) -> Any:
    """The value of JSON inside a row, within the limits of a row; None where it is none."""
    try:
        parse.check_json(text.encode("utf-8"), "", limits.ROW_VALUES)
        return json.loads(text)
    except (InputError, ValueError, RecursionError):
        return None
