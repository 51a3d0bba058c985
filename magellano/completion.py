"""Tokens as text: characters held back until they are whole, stop strings, many prompts at once, a conversation."""

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from magellano.data.formats import Role, header
from magellano.errors import InputError
from magellano.generate import Context, together
from magellano.model import MagellanoLM
from magellano.sampling import Sampling
from magellano.tokenizer import Tokenizer

ToBytes = Callable[[Sequence[int]], bytes]


class Finish(StrEnum):
    """Why a text ends."""

    END_OF_TEXT = "end-of-text"
    STOP = "stop"  # one of the stop strings, which is left out
    LENGTH = "length"  # max_tokens


class Writer:
    """One sequence's text as its tokens come. A character that spans tokens is held back until it is whole, and what
    may become a stop string until it is none.
    """

    def __init__(self, to_bytes: ToBytes, stops: Sequence[str] = ()):
        """Raises InputError for an empty stop string."""
        if not all(stops):
            raise InputError("stop: an empty string would stop before the first character; leave it out")
        self._to_bytes, self._stops = to_bytes, tuple(stops)
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self.stopped = False

    def push(self, token: int) -> str:
        """The text that `token` makes certain."""
        return self._released(self._decoder.decode(self._to_bytes([token])))

    def finish(self) -> str:
        """What was held back when no token follows."""
        piece = self._released(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return piece + rest

    def _released(self, piece: str) -> str:
        if self.stopped:
            return ""
        self._held += piece
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped, text, self._held = True, self._held[: min(found)], ""
            return text
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        text, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return text


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` begin `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-n:])), 0)


def text(tokens: Iterator[int], to_bytes: ToBytes, stops: Sequence[str] = ()) -> Iterator[str]:
    """The tokens' text as it grows, up to a stop string; no token is asked for after it."""
    writer = Writer(to_bytes, stops)
    for token in tokens:
        if piece := writer.push(token):
            yield piece
        if writer.stopped:
            return
    if rest := writer.finish():
        yield rest


@dataclass
class Completion:
    """What continues one prompt."""

    text: str
    tokens: list[int]
    finish: Finish


def complete(
    model: MagellanoLM,
    tokenizer: Tokenizer,
    contexts: Sequence[Context],
    max_tokens: int,
    sampling: Sampling,
    stops: Sequence[str] = (),
    number: int = 0,
    heard: Callable[[int, str], None] = lambda n, piece: None,
) -> list[Completion]:
    """What continues each of `contexts`, in lock-step. Sequence n draws with seed + number + n, so its text does not
    depend on the others. `heard(n, piece)` is called with each piece of text as it is made.
    """
    writers = [Writer(tokenizer.decode_bytes, stops) for _ in contexts]
    made = [Completion("", [], Finish.END_OF_TEXT) for _ in contexts]

    def say(n: int, piece: str) -> None:
        if piece:
            made[n].text += piece
            heard(n, piece)

    steps = together(model, contexts, tokenizer.end_of_text, max_tokens, sampling, number, lambda n: writers[n].stopped)
    for tokens in steps:
        for n, token in enumerate(tokens):
            if token is not None:
                made[n].tokens.append(token)
                say(n, writers[n].push(token))
    for n, writer in enumerate(writers):
        say(n, writer.finish())
        if writer.stopped:
            made[n].finish = Finish.STOP
        elif len(made[n].tokens) == max_tokens:
            made[n].finish = Finish.LENGTH
    return made


class Chat:
    """A conversation by the template of the data format "chat"; the model's state carries it from turn to turn."""

    STOP = header(Role.USER)  # where a model goes on with the user's part

    def __init__(self, model: MagellanoLM, tokenizer: Tokenizer, context: Context):
        """`context` is where the conversation so far has led, or the start of a document."""
        self.model, self.tokenizer, self.context = model, tokenizer, context

    def say(self, role: Role, content: str) -> None:
        """Read a message."""
        words = self.tokenizer.encode(header(role, first=len(self.context.tokens) == 1))
        self.context = self.context.extended(self.model, words + self.tokenizer.encode(content))

    def answer(
        self,
        max_tokens: int,
        sampling: Sampling,
        stops: Sequence[str] = (),
        heard: Callable[[int, str], None] = lambda n, piece: None,
    ) -> Completion:
        """The assistant's turn, read as it is written in training: with the end-of-text behind it."""
        here = self.context.extended(self.model, self.tokenizer.encode(header(Role.ASSISTANT)))
        stops = [*stops, self.STOP]
        (made,) = complete(self.model, self.tokenizer, [here], max_tokens, sampling, stops, heard=heard)
        said = self.tokenizer.encode(made.text) if made.finish is Finish.STOP else made.tokens
        self.context = here.extended(self.model, [*said, self.tokenizer.end_of_text])
        return made
