"""Chat templates in Jinja, as `tokenizer_config.json` has them: what a conversation says, and which of it counts.

A template comes with a model, so from strangers: it runs in Jinja's sandbox, sees nothing but the conversation, and its
output is bounded by a row's length. One that means to waste time or memory still can: take it as you take a model.
Its eos_token, as a variable or spelled out, becomes our end-of-text, which also follows the last answer; its bos_token
becomes nothing, for every document starts with end-of-text anyway. Any other special token is text.
"""

import json
import os
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from magellano import files
from magellano.data import limits
from magellano.data.shapes import Call, Conversation, Message, Role, compact
from magellano.errors import InputError

FILE = "chat_template.json"  # where tokens, releases and model folders keep it: as a tokenizer_config.json has it
END = "\0end\0"  # stands for the end-of-text while a template runs: no row that passed the checks holds a NUL
MESSAGES = 400  # of a conversation: each answer is found by rendering what leads up to it
GROWING = ("ljust", "rjust", "center", "zfill", "expandtabs", "format", "format_map")  # long strings out of short ones
TEMPLATE_BYTES = limits.MIB
PROBE = "\ue000"  # a private character: stands for an answer while what stands around it is found
_REMEDY = "give a tokenizer_config.json with a chat_template, or the template itself as .jinja"


class Unfit(ValueError):
    """A conversation that the template refuses, or that it renders so that the answers cannot be told apart."""


@dataclass(frozen=True)
class Template:
    """`source`: the Jinja text; `label`: for messages; `eos`: what its model spells END."""

    source: str
    label: str
    eos: str = ""

    @classmethod
    def read(cls, path: Path) -> "Template":
        """The template in a `tokenizer_config.json` (of several, "default"), or a text file. InputError for none."""
        eos: Any = None
        if path.suffix == ".json":
            config = files.read_json(path, _REMEDY)
            found, eos = config.get("chat_template"), config.get("eos_token")
            eos = eos.get("content") if isinstance(eos, dict) else eos
        else:
            found = _text(path)
        if isinstance(found, list):
            found = {e.get("name"): e.get("template") for e in found if isinstance(e, dict)}.get("default")
        if not isinstance(found, str) or not found.strip():
            raise InputError(f"{path}: no chat_template in it; {_REMEDY}")
        eos = eos if isinstance(eos, str) and eos.strip() else ""
        made = cls(found.replace(eos, END) if eos else found, str(path), eos)
        made._compiled  # noqa: B018 (a template that is none is refused here)
        return made

    @classmethod
    def kept(cls, folder: Path) -> "Template | None":
        """The template that `keep` wrote; None where there is none."""
        return cls.read(folder / FILE) if os.path.lexists(folder / FILE) else None

    def keep(self, folder: Path) -> None:
        """Write it into `folder`, for `read`."""
        text = json.dumps({"chat_template": self.spelled(self.eos), "eos_token": self.eos or None}, indent=2)
        (folder / FILE).write_text(text + "\n", encoding="utf-8")

    def spelled(self, end: str) -> str:
        """The Jinja text with `end` where it spells its end-of-text out."""
        return self.source.replace(END, end)

    def prompt(self, said: Conversation) -> str:
        """All that is read before the next answer, with END where end-of-text is. Raises Unfit."""
        return self._render(said, len(said.messages), asks=True)

    def whole(self, said: Conversation) -> str:
        """The conversation, with END where end-of-text is. Raises Unfit."""
        return self._render(said, len(said.messages))

    def around(self, said: Conversation) -> tuple[str, str]:
        """What stands before the next answer's content, behind the prompt, and behind the content, up to end-of-text.
        Raises Unfit.
        """
        prompt = self.prompt(said)
        whole = self.whole(replace(said, messages=(*said.messages, Message(Role.ASSISTANT, PROBE))))
        before, found, behind = whole[len(prompt) :].partition(PROBE)
        if not found or not whole.startswith(prompt):
            raise Unfit("is rendered by the chat template so that answers cannot be told from prompts")
        return before, behind.split(END)[0]

    def parts(self, said: Conversation) -> list[tuple[str, bool, bool]]:
        """(text, whether it counts, whether end-of-text follows) of a conversation. An answer is what it adds to the
        prompt before it, up to its end-of-text. Raises Unfit.
        """
        if len(said.messages) > MESSAGES:
            raise Unfit(f"has more than {MESSAGES} messages, too many for a chat template")
        if "\\u0000" in compact([[c.arguments, c.name] for m in said.messages for c in m.calls] + [said.tools]):
            raise Unfit("holds a NUL character in a tool or a call")
        done, made, answer = "", [], []
        for index, message in enumerate(said.messages):
            if message.role is Role.ASSISTANT:
                prompt = self._render(said, index, asks=True)
                whole = self._render(said, index + 1)
                if not prompt.startswith(done) or not whole.startswith(prompt):
                    raise Unfit("is rendered by the chat template so that answers cannot be told from prompts")
                answer = _pieces(whole[len(prompt) :], True)
                learnt = "".join(text for text, counts, _ in answer if counts)
                if not learnt.strip():
                    raise Unfit("has an answer of which the chat template leaves nothing (does it know tool calls?)")
                if not all(_in(learnt, call.name) for call in message.calls):
                    raise Unfit("has a tool call that the chat template leaves out")
                answer = answer if message.learnt else [(text, False, ends) for text, _, ends in answer]
                made += [*_pieces(prompt[len(done) :], False), *answer]
                done = whole
        rest = self._render(said, len(said.messages))
        if not rest.startswith(done):
            raise Unfit("is rendered by the chat template so that answers cannot be told from prompts")
        if lost := _lost(said, rest):
            raise Unfit(f"has {lost} that the chat template leaves out")
        if answer and not any(ends for _, counts, ends in answer if counts):
            made[-1] = (made[-1][0], True, True)
        return made + _pieces(rest[len(done) :], False)

    def _render(self, said: Conversation, count: int, asks: bool = False) -> str:
        import jinja2

        facts = {
            "messages": [_plain(message) for message in said.messages[:count]], "add_generation_prompt": asks,
            "tools": list(said.tools) or None, "bos_token": "", "eos_token": END,
        }  # fmt: skip
        made, size = [], 0
        try:
            for piece in self._compiled.generate(facts):
                made.append(piece)
                if (size := size + len(piece)) > limits.ROW_BYTES:
                    raise Unfit(f"is rendered by the chat template to more than {limits.ROW_BYTES // limits.MIB} MiB")
        except Unfit:
            raise
        except (jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, RecursionError) as e:
            told = (str(e).splitlines() or [type(e).__name__])[0][:120]
            raise Unfit(f"is refused by the chat template ({told})") from None
        return "".join(made)

    @cached_property
    def _compiled(self) -> Any:
        import jinja2

        try:
            return _environment().from_string(self.source)
        except (jinja2.TemplateError, RecursionError) as e:
            raise InputError(f"{self.label}: not a chat template ({str(e).splitlines()[0]}); {_REMEDY}") from None


def _text(path: Path) -> str:
    with files.opened(path, _REMEDY) as fd:
        if (size := os.fstat(fd).st_size) > TEMPLATE_BYTES:
            raise InputError(f"{path}: longer than {TEMPLATE_BYTES // limits.MIB} MiB; {_REMEDY}")
        data = files.read_at(fd, 0, size)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: not UTF-8; {_REMEDY}") from None


def _plain(message: Message) -> dict[str, Any]:
    made: dict[str, Any] = {"role": str(message.role), "content": message.content}
    if message.calls:
        made["tool_calls"] = [_call(call) for call in message.calls]
    return made | dict(message.answers)


def _call(call: Call) -> dict[str, Any]:
    identified = {"id": call.id} if call.id else {}
    return {"type": "function", **identified, "function": {"name": call.name, "arguments": call.arguments}}


def _lost(said: Conversation, text: str) -> str:
    """What of the tools the template leaves out of `text`; "" for nothing."""
    names = [function.get("name") for tool in said.tools if isinstance(function := tool.get("function", tool), dict)]
    if any(isinstance(name, str) and not _in(text, name) for name in names):
        return "a tool"
    answers = [m.content.strip() for m in said.messages if m.role is Role.TOOL]
    return "" if all(_in(text, answer) for answer in answers) else "a tool's answer"


def _in(text: str, said: str) -> bool:
    """Whether `text` holds `said`, as it is or as JSON."""
    return said in text or compact(said)[1:-1] in text


def _pieces(text: str, counts: bool) -> list[tuple[str, bool, bool]]:
    *ended, rest = text.split(END)
    behind = [(rest, counts and not ended, False)] if rest else []
    return [*((piece, counts, True) for piece in ended), *behind]


def _environment() -> Any:
    """Jinja as transformers sets it up, in the sandbox: what templates are written for."""
    from jinja2 import nodes
    from jinja2.exceptions import SecurityError, TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks answers for transformers; here they are found without it."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    class Sandbox(ImmutableSandboxedEnvironment):
        intercepted_binops = frozenset(["*", "**", "%"])

        def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
            grows = isinstance(obj, str) and attr in GROWING
            return not grows and super().is_safe_attribute(obj, attr, value)

        def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
            numbers = isinstance(left, int | float) and isinstance(right, int | float)
            if not numbers and operator == "*":
                sized, times = (left, right) if isinstance(right, int) else (right, left)
                if len(sized) * times > limits.BLANK_RUN:
                    raise SecurityError("a string or a list is repeated too often")
            elif not numbers or (operator == "**" and (abs(left) > 1000 or abs(right) > 1000)):
                raise SecurityError(f"{operator} is not for this in a chat template")
            return super().call_binop(context, operator, left, right)

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def to_json(value: Any, indent: int | None = None, ensure_ascii: bool = False, **more: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent and min(indent, 8))

    made = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    for dear in ("center", "format", "indent", "wordwrap", "filesizeformat", "pprint", "xmlattr", "urlize"):
        made.filters.pop(dear, None)  # make long strings out of short ones
    made.filters["tojson"] = to_json
    made.globals |= {"raise_exception": refuse, "strftime_now": _no_clock}
    made.globals.pop("lipsum", None)
    return made


def _no_clock(form: str) -> str:
    """A fixed day: the same data make the same tokens on every day."""
    return datetime(2026, 1, 1).strftime(form[:64])
