"""What a row of each format says, as segments of text that count in the loss or do not, and as one document of tokens.

text         {text}                               everything counts
completions  {prompt, completion}                 the completion counts; the two are joined with nothing between
chat         {messages: [{role, content}, ...]}   what the assistant says counts, with the end-of-text after each turn
alpaca       {instruction, input, output}         as a chat of two turns
sharegpt     {conversations: [{from, value}]}     as a chat
preference   {prompt, chosen, rejected}           a pair of documents, prompt with either answer: as completions, or
                                                  of messages as chats, of which the answer alone counts

The chat template is plain text, so that it needs no tokens of its own (\\n is a line feed, EOT the end-of-text token):
    ### System:\\nCONTENT\\n\\n### User:\\nCONTENT\\n\\n### Assistant:\\nCONTENT EOT \\n\\n### User:\\n...
Tools come first, as ### Tools: with one JSON object a line; a tool call is a line of JSON in the assistant's turn,
which counts, and what the tool answered is ### Tool:.
"""

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from magellano.data.shapes import Conversation, Message, Role, answered, compact, conversation
from magellano.data.template import Template, Unfit
from magellano.names import DataFormat

Render = Callable[[str], str]

COLUMNS: dict[DataFormat, tuple[str, ...]] = {
    DataFormat.TEXT: ("text",),
    DataFormat.COMPLETIONS: ("prompt", "completion"),
    DataFormat.CHAT: ("messages",),
    DataFormat.ALPACA: ("instruction", "output"),
    DataFormat.SHAREGPT: ("conversations",),
    DataFormat.PREFERENCE: ("prompt", "chosen", "rejected"),
}
OPTIONAL: dict[DataFormat, tuple[str, ...]] = {
    DataFormat.CHAT: ("tools",),
    DataFormat.ALPACA: ("input", "system"),
    DataFormat.SHAREGPT: ("system", "tools"),
    DataFormat.PREFERENCE: ("tools",),
}


def columns(format: DataFormat) -> tuple[str, ...]:
    """All that is read of a row."""
    return COLUMNS[format] + OPTIONAL.get(format, ())


@dataclass(frozen=True)
class Segment:
    """Text that counts in the loss or is context only; `ends`: an end-of-text token follows and counts as it does;
    `opens`: it begins the second document of a pair.
    """

    text: str
    counts: bool
    ends: bool = False
    opens: bool = False


@dataclass(frozen=True)
class Document:
    """A document as its targets t1..tn, end-of-text; its inputs are end-of-text, t1..tn.

    targets uint16 [n+1], counts uint8 [n+1]: 1 where the target is in the loss; digest: of the content. Of a pair both
    documents stand behind each other, and `second` is where the second begins (0: there is none).
    """

    targets: np.ndarray
    counts: np.ndarray
    digest: bytes = b""
    source: int = 0  # number of the source that it comes from
    second: int = 0


def segments(
    row: dict[str, Any],
    format: DataFormat,
    template: Template | None = None,
    render: Render = lambda text: text,
) -> list[Segment]:
    """The segments of a row that `schema` has found valid; `render` is applied to what the assistant does not say.
    Raises Unfit for a conversation that `template` refuses.
    """
    match format:
        case DataFormat.TEXT:
            return [Segment(row["text"], counts=True, ends=True)]
        case DataFormat.COMPLETIONS:
            return [Segment(render(row["prompt"]), counts=False), Segment(row["completion"], counts=True, ends=True)]
        case DataFormat.PREFERENCE:
            return _pair(row, template, render)
        case _:
            return _conversed(conversation(row, format), template, render)


def _conversed(said: Conversation, template: Template | None, render: Render) -> list[Segment]:
    turns = (m if m.role is Role.ASSISTANT else replace(m, content=render(m.content)) for m in said.messages)
    said = replace(said, messages=tuple(turns))
    return told(said) if template is None else [Segment(*part) for part in template.parts(said)]


def _pair(row: dict[str, Any], template: Template | None, render: Render) -> list[Segment]:
    """Two documents behind each other. Raises Unfit."""
    texts = [isinstance(row[column], str) for column in COLUMNS[DataFormat.PREFERENCE]]
    if any(texts) and not all(texts):
        raise Unfit("is text where chosen or rejected are messages, or the other way round")
    if row["chosen"] == row["rejected"]:
        raise Unfit("has the same answer as chosen and rejected")
    if all(texts):
        asked = Segment(render(row["prompt"]), counts=False)
        chosen, rejected = ([asked, Segment(row[which], counts=True, ends=True)] for which in ("chosen", "rejected"))
    else:
        chosen, rejected = (_conversed(answered(row, which), template, render) for which in ("chosen", "rejected"))
    return [*chosen, replace(rejected[0], opens=True), *rejected[1:]]


def chat(messages: list[dict[str, Any]]) -> list[Segment]:
    """Messages by the template above. A prompt adds `header(Role.ASSISTANT)`."""
    return told(conversation({"messages": messages}, DataFormat.CHAT))


def told(said: Conversation) -> list[Segment]:
    """A conversation by the template above."""
    made: list[Segment] = []
    if said.tools:
        listed = "\n".join(compact(tool) for tool in said.tools)
        made.append(Segment(f"### Tools:\n{listed}", counts=False))
    for message in said.messages:
        made += _turn(message, first=not made)
    return made


def _turn(message: Message, first: bool) -> list[Segment]:
    answers = message.role is Role.ASSISTANT
    counts = answers and message.learnt
    return [
        Segment(header(message.role, first), counts=False), Segment(message.text, counts=counts, ends=answers)
    ]  # fmt: skip


def header(role: Role, first: bool = False) -> str:
    """What the template puts before a message."""
    return f"{'' if first else chr(10) * 2}### {role.capitalize()}:\n"


def digest(parts: list[Segment]) -> bytes:
    """16 bytes that stand for a row's content: what is said and what of it counts, and nothing else in the row."""
    said = [(part.text, part.counts, *(["second"] if part.opens else [])) for part in parts]
    content = json.dumps(said, ensure_ascii=False)
    return hashlib.blake2b(content.encode("utf-8"), digest_size=16).digest()


def document(
    parts: Iterable[tuple[Segment, list[int]]], end_of_text: int, digest: bytes = b"", source: int = 0
) -> Document:
    """The segments with their token ids as one document, ended by end-of-text (context where none was asked)."""
    ids: list[int] = []
    counts: list[bool] = []
    ended, second = False, 0
    for segment, tokens in parts:
        if segment.opens:
            if not ended:
                ids.append(end_of_text)
                counts.append(False)
            second = len(ids)
        ids += tokens
        counts += [segment.counts] * len(tokens)
        ended = segment.ends
        if ended:
            ids.append(end_of_text)
            counts.append(segment.counts)
    if not ended:
        ids.append(end_of_text)
        counts.append(False)
    return Document(np.array(ids, dtype=np.uint16), np.array(counts, dtype=np.uint8), digest, source, second)
