"""A conversation by a model's own chat template, cut into the same pieces as in training."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from magellano.completion import Completion, complete
from magellano.data.shapes import Conversation, Message, Role
from magellano.data.template import END, Template, Unfit
from magellano.errors import InputError
from magellano.generate import Context
from magellano.model import MagellanoLM
from magellano.sampling import Sampling
from magellano.tokenizer import Tokenizer

T = TypeVar("T")


class TemplatedChat:
    """As `completion.Chat`. The state carries what was read from turn to turn, as long as the template adds to it: one
    that writes earlier turns anew has all of it read again.
    """

    def __init__(self, model: MagellanoLM, tokenizer: Tokenizer, start: Context, template: Template):
        """`start`: that of a document."""
        self.model, self.tokenizer, self.context = model, tokenizer, start
        self._start, self._template, self._read = start, template, ""
        self._said = Conversation(())

    def say(self, role: Role, content: str) -> None:
        """A message, read when an answer is asked for."""
        self._said = replace(self._said, messages=(*self._said.messages, Message(role, content.replace(END, ""))))

    def answer(
        self,
        max_tokens: int,
        sampling: Sampling,
        stops: Sequence[str] = (),
        heard: Callable[[int, str], None] = lambda n, piece: None,
    ) -> Completion:
        """The assistant's turn. It ends at end-of-text, or at what the template puts behind an answer. InputError where
        the template refuses the conversation.
        """
        before, behind = self._by_template(lambda: self._template.around(self._said))
        named = before.rstrip()  # who speaks, where the prompt does not say so; a blank belongs to the word behind it
        self._follow(self._by_template(lambda: self._template.prompt(self._said)) + named)
        ends = [behind.strip()] if behind.strip() else []
        (made,) = complete(
            self.model, self.tokenizer, [self.context], max_tokens, sampling, [*stops, *ends], heard=heard
        )
        said = self.tokenizer.encode(made.text)
        whole = self.tokenizer.decode_bytes(made.tokens) == made.text.encode("utf-8")  # no stop string was cut off
        self.context = self.context.extended(self.model, made.tokens if whole else said)
        self._read += made.text
        made.text = made.text.removeprefix(before[len(named) :])
        self.say(Role.ASSISTANT, made.text)
        self._follow(self._by_template(lambda: self._template.whole(self._said)), again=False)
        return made

    def _by_template(self, made: Callable[[], T]) -> T:
        try:
            return made()
        except Unfit as e:
            raise InputError(f"--chat: this conversation {e}; say something else") from None

    def _follow(self, text: str, again: bool = True) -> None:
        """Read what `text` adds to what was read; where it is another text, `again` from the document's start."""
        if not text.startswith(self._read):
            if not again:
                return
            self.context, self._read = self._start, ""
        *ended, rest = text[len(self._read) :].split(END)
        tokens = [t for piece in ended for t in (*self.tokenizer.encode(piece), self.tokenizer.end_of_text)]
        self.context = self.context.extended(self.model, [*tokens, *self.tokenizer.encode(rest)])
        self._read = text
