"""What a row of each format says, as segments of text that count in the loss or do not, and as one document of tokens.

text         {text}                               everything counts
completions  {prompt, completion}                 the completion counts; the two are joined with nothing between
chat         {messages: [{role, content}, ...]}   what the assistant says counts, with the end-of-text after each turn

The chat template is plain text, so that it needs no tokens of its own (\\n is a line feed, EOT the end-of-text token):
    ### System:\\nCONTENT\\n\\n### User:\\nCONTENT\\n\\n### Assistant:\\nCONTENT EOT \\n\\n### User:\\n...
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np

from magellano.names import DataFormat

COLUMNS: dict[DataFormat, tuple[str, ...]] = {
    DataFormat.TEXT: ("text",),
    DataFormat.COMPLETIONS: ("prompt", "completion"),
    DataFormat.CHAT: ("messages",),
}


class Role(StrEnum):
    """Who speaks in a chat."""

    SYSTEM = "system"
    USER = "user"
    ASSISTANT = "assistant"


@dataclass(frozen=True)
class Segment:
    """Text that counts in the loss or is context only; `ends`: an end-of-text token follows and counts as it does."""

    text: str
    counts: bool
    ends: bool = False


@dataclass(frozen=True)
class Document:
    """A document as its targets t1..tn, end-of-text; its inputs are end-of-text, t1..tn.

    targets uint16 [n+1], counts uint8 [n+1]: 1 where the target is in the loss; digest: of the content.
    """

    targets: np.ndarray
    counts: np.ndarray
    digest: bytes = b""


def segments(row: dict[str, Any], format: DataFormat) -> list[Segment]:
    """The segments of a row that `schema` has found valid."""
    match format:
        case DataFormat.TEXT:
            return [Segment(row["text"], counts=True, ends=True)]
        case DataFormat.COMPLETIONS:
            return [Segment(row["prompt"], counts=False), Segment(row["completion"], counts=True, ends=True)]
        case DataFormat.CHAT:
            return chat(row["messages"])


def chat(messages: list[dict[str, str]]) -> list[Segment]:
    """A conversation by the template above. A prompt adds `header(Role.ASSISTANT)`."""
    made: list[Segment] = []
    for i, message in enumerate(messages):
        role = Role(message["role"])
        answers = role is Role.ASSISTANT
        made.append(Segment(header(role, first=i == 0), counts=False))
        made.append(Segment(message["content"], counts=answers, ends=answers))
    return made


def header(role: Role, first: bool = False) -> str:
    """What the template puts before a message."""
    return f"{'' if first else chr(10) * 2}### {role.capitalize()}:\n"


def digest(parts: list[Segment]) -> bytes:
    """16 bytes that stand for a row's content: what is said and what of it counts, and nothing else in the row."""
    content = json.dumps([(part.text, part.counts) for part in parts], ensure_ascii=False)
    return hashlib.blake2b(content.encode("utf-8"), digest_size=16).digest()


def document(parts: Iterable[tuple[Segment, list[int]]], end_of_text: int, digest: bytes = b"") -> Document:
    """The segments with their token ids as one document, ended by end-of-text (context where none was asked)."""
    ids: list[int] = []
    counts: list[bool] = []
    ended = False
    for segment, tokens in parts:
        ids += tokens
        counts += [segment.counts] * len(tokens)
        ended = segment.ends
        if ended:
            ids.append(end_of_text)
            counts.append(segment.counts)
    if not ended:
        ids.append(end_of_text)
        counts.append(False)
    return Document(np.array(ids, dtype=np.uint16), np.array(counts, dtype=np.uint8), digest)
