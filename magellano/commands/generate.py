"""magellano generate RUN --prompt TEXT | --stdin | --prompts FILE | --chat"""

import argparse
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console

    from magellano.commands.chosen import Chosen
    from magellano.commands.voices import Voices
    from magellano.completion import Completion
    from magellano.data.template import Template
    from magellano.generate import Context
    from magellano.model import MagellanoLM
    from magellano.sampling import Sampling
    from magellano.tokenizer import Tokenizer

HELP = "continue prompts with a release, token by token, or talk with it"
PROMPT_BYTES = 64 << 20  # of a prompt on standard input, or of a file of prompts


def run_argument(parser: argparse.ArgumentParser) -> None:
    """RUN, which evaluate and generate share."""
    what = "a release: its folder, the start of its key, a profile's name (its newest), or PROFILE@promoted"
    parser.add_argument("run", metavar="RUN", help=what)


def arguments(parser: argparse.ArgumentParser) -> None:
    from magellano.commands import voices

    run_argument(parser)
    voices.arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--prompt", metavar="TEXT", help="the text to continue")
    what.add_argument("--stdin", action="store_true", help="the same from standard input, all of it")
    many = 'many: a text file with one a line, or .jsonl with {"prompt": TEXT} a line (and "adapter": NAME)'
    what.add_argument("--prompts", type=Path, metavar="FILE", help=many)
    what.add_argument("--chat", action="store_true", help="a conversation: each line of standard input is a turn")
    add = parser.add_argument
    add("--system", metavar="TEXT", help="with --chat: the message before the first turn")
    add("--max-tokens", type=int, default=128, metavar="N", help="stop after N tokens (default 128)")
    add("--temperature", type=float, default=0.0, metavar="T", help="0, the default: the likeliest token")
    add("--top-k", type=int, default=0, metavar="K", help="choose among the K likeliest (0: all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="choose among the likeliest that make P")
    add(
        "--min-p",
        type=float,
        default=0.0,
        metavar="P",
        help="leave out what is less than P times the likeliest",
    )
    penalty = "weaken tokens that were there before: 1, the default, not at all"
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help=penalty)
    add("--stop", action="append", default=[], metavar="TEXT", help="stop before TEXT; may be given more than once")
    add("--seed", type=int, default=0, help="same seed, same text; prompt n of a file has seed + n")
    add("--batch", type=int, default=8, metavar="B", help="with --prompts: sequences at a time (default 8)")
    add("--state", type=Path, metavar="FILE", help="go on from a state that --save-state wrote")
    add("--save-state", type=Path, metavar="FILE", help="keep what was read and written, a few MB, as .safetensors")


@dataclass(frozen=True)
class Session:
    """What every way of generating needs."""

    args: argparse.Namespace
    model: "MagellanoLM"
    tokenizer: "Tokenizer"
    sampling: "Sampling"
    start: "Context"  # where a prompt goes on: the start of a document, or the state that was given
    voices: "Voices"
    name: str  # of the adapter in use
    template: "Template | None" = None  # the chat template of the training data, where it is not ours
    toon: bool = False  # whether the prompts that it was trained on have their JSON records in TOON

    def switched(self, name: str | None, where: str) -> "Session":
        """The same with another adapter; None: the one that was asked for at first. What was read so far is left."""
        name = name or self.voices.default
        if name == self.name:
            return self
        return _session(self.args, self.voices, self.tokenizer, self.sampling, name, where)

    def encoded(self, text: str) -> list[int]:
        """The tokens of a prompt, its JSON records as in training."""
        if self.toon:
            from magellano.data.toon import rendered

            text, _ = rendered(text)
        return self.tokenizer.encode(text)

    def heard(self) -> Callable[[int, str], None]:
        """Writes pieces of text as they are made, unless --json wants one object."""

        def write(_: int, piece: str) -> None:
            if not self.args.json:
                sys.stdout.write(piece)
                sys.stdout.flush()

        return write


def run(args: argparse.Namespace) -> dict[str, Any]:
    from magellano.errors import InputError
    from magellano.sampling import Sampling

    penalty = args.repetition_penalty
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed, args.min_p, penalty)
    if args.prompts is not None and args.save_state:
        raise InputError("--save-state keeps one sequence, --prompts makes many; use --prompt")
    if args.system is not None and not args.chat:
        raise InputError("--system belongs to --chat; put it into the prompt")
    if args.batch < 1 or args.max_tokens < 1:
        raise InputError(f"max_tokens {args.max_tokens} and batch {args.batch} must be 1 or more")
    from magellano.commands.chosen import Chosen
    from magellano.commands.voices import Voices

    chosen = Chosen.find(args.run)
    if not args.use:
        _template(args, chosen)  # what cannot be is said before a model is loaded
    from magellano import context

    if args.save_state:
        context.check(args.save_state)
    voices, tokenizer = Voices.find(chosen, args), chosen.tokenizer()
    identity = context.identity(voices.folders()) if args.state or args.save_state else b""
    if args.state:
        voices.known[voices.default].start = context.load(args.state, voices.model, identity)
    session = _session(args, voices, tokenizer, sampling, voices.default, "--use")
    way = _chat if args.chat else _many if args.prompts is not None else _one
    facts, end = way(session)
    if args.save_state:
        context.save(args.save_state, end, identity)
        facts["state"] = str(args.save_state)
    return {"release": str(chosen.folder), **facts}


def _template(args: argparse.Namespace, spoken: "Chosen") -> "Template | None":
    """What --chat talks by; None for ours. InputError where that cannot be."""
    from magellano.errors import InputError

    template = spoken.template() if args.chat else None
    if template is not None and args.state:
        raise InputError(
            "--chat: this release's chat template needs the messages, which --state does not hold; leave it out, or "
            "give --prompt the text that the template makes"
        )
    return template


def _session(
    args: argparse.Namespace, voices: "Voices", tokenizer: "Tokenizer", sampling: "Sampling", name: str, where: str
) -> Session:
    """With the adapter `name`, put on."""
    from magellano import generate
    from magellano.commands.chosen import Chosen
    from magellano.names import DataRender

    voice = voices.use(name, where)
    if voice.start is None:
        voice.start = generate.begin(voices.model, tokenizer.end_of_text)
    spoken = voices.chosen if voice.release is None else Chosen.of(voice.release)
    template = _template(args, spoken)
    toon = voice.release is not None and voice.release.profile.data.render is DataRender.TOON
    return Session(args, voices.model, tokenizer, sampling, voice.start, voices, name, template, toon)


def _one(session: Session) -> tuple[dict[str, Any], "Context"]:
    from magellano.completion import complete

    args, model, tokenizer = session.args, session.model, session.tokenizer
    prompt = sys.stdin.buffer.read(PROMPT_BYTES + 1) if args.stdin else args.prompt.encode("utf-8", "surrogateescape")
    text = _utf8(prompt, "standard input" if args.stdin else "--prompt")
    started = time.perf_counter()
    read = session.start.extended(model, session.encoded(text))
    prefill = time.perf_counter()
    (made,) = complete(model, tokenizer, [read], args.max_tokens, session.sampling, args.stop, heard=session.heard())
    facts = {"prompt": text, **_facts(made), "seconds": time.perf_counter() - started}
    facts["prompt_tokens"], facts["prompt_seconds"] = len(read.tokens), prefill - started
    return facts, read.extended(model, made.tokens) if args.save_state else read


def _facts(made: "Completion") -> dict[str, Any]:
    return {"text": made.text, "tokens": len(made.tokens), "finish": str(made.finish)}


def _many(session: Session) -> tuple[dict[str, Any], "Context"]:
    from magellano.completion import complete

    args, model, tokenizer, first = session.args, session.model, session.tokenizer, session.start
    given, made = prompts(args.prompts), list[dict[str, Any]]()
    started = time.perf_counter()
    while len(made) < len(given):
        at = len(made)
        group = list(itertools.takewhile(lambda p: p.adapter == given[at].adapter, given[at : at + args.batch]))  # noqa: B023
        session = session.switched(group[0].adapter, group[0].where)
        contexts = [session.start.extended(model, session.encoded(prompt.text)) for prompt in group]
        done = complete(model, tokenizer, contexts, args.max_tokens, session.sampling, args.stop, at)
        named = {} if session.voices.adapters is None else {"adapter": session.name}
        for prompt, one in zip(group, done, strict=True):
            made.append({"prompt": prompt.text, **named, **_facts(one)})
            if not args.json:
                print(json.dumps(made[-1], ensure_ascii=False), flush=True)
    tokens = sum(one["tokens"] for one in made)
    return {"completions": made, "tokens": tokens, "seconds": time.perf_counter() - started}, first


class Prompt(NamedTuple):
    """A prompt of a file, the adapter that its line asks for, and the line."""

    text: str
    adapter: str | None
    where: str


def prompts(path: Path) -> list[Prompt]:
    """The prompts in a file: its lines, or of JSON Lines the key `prompt` of each. InputError with file and line."""
    from magellano import files
    from magellano.errors import InputError

    with files.opened(path, "give a text file with a prompt a line, or .jsonl") as fd:
        data = _utf8(files.read_at(fd, 0, PROMPT_BYTES + 1), str(path))
    found = []
    for number, line in enumerate(data.splitlines() if path.suffix != ".jsonl" else data.split("\n"), 1):
        if not line.strip():
            continue
        adapter, where = None, f"{path}: line {number}"
        if path.suffix == ".jsonl":
            try:
                row = files.parse(line.encode())
            except ValueError as e:
                raise InputError(f"{where}: {e}; correct or remove it") from None
            if not isinstance(row.get("prompt"), str):
                raise InputError(f'{where}: no text under "prompt"; correct or remove it')
            line, adapter = row["prompt"], row.get("adapter")
            if adapter is not None and not (isinstance(adapter, str) and adapter.isprintable()):
                raise InputError(f'{where}: no name under "adapter"; correct or remove it')
        found.append(Prompt(line, adapter, where))
    if not found:
        raise InputError(f"{path}: no prompt in it; write one a line")
    return found


def _chat(session: Session) -> tuple[dict[str, Any], "Context"]:
    from magellano.completion import Chat
    from magellano.data import toon
    from magellano.data.formats import Role
    from magellano.templated import TemplatedChat

    args, messages, tokens = session.args, [], 0
    given = session.model, session.tokenizer, session.start
    chat = Chat(*given) if session.template is None else TemplatedChat(*given, session.template)
    if args.system is not None:
        chat.say(Role.SYSTEM, args.system)
        messages.append({"role": "system", "content": args.system})
    started = time.perf_counter()
    for turn in _turns():
        chat.say(Role.USER, toon.rendered(turn)[0] if session.toon else turn)
        made = chat.answer(args.max_tokens, session.sampling, args.stop, session.heard())
        if not args.json:
            print(flush=True)
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": made.text}]
        tokens += len(made.tokens)
    return {"messages": messages, "tokens": tokens, "seconds": time.perf_counter() - started}, chat.context


def _turns() -> Iterator[str]:
    """The lines of standard input that are not blank, asked for on a terminal."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.buffer.readline(PROMPT_BYTES + 1)
        if not line:
            return
        if turn := _utf8(line, "standard input").strip():
            yield turn


def _utf8(data: bytes, where: str) -> str:
    from magellano.errors import InputError

    if len(data) > PROMPT_BYTES:
        raise InputError(f"{where}: more than {PROMPT_BYTES:,} bytes; give less, and go on from it with --state")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise InputError(f"{where}: not UTF-8 (byte {e.start}); save it as UTF-8") from None


def show(facts: dict[str, Any], console: "Console") -> None:
    """The text has been printed as it was made; its end and its speed are what is left."""
    if "text" in facts:
        console.print()
    speed = facts["tokens"] / facts["seconds"] if facts["seconds"] else 0.0
    kept = f"; state kept in {facts['state']}" if "state" in facts else ""
    print(f"{facts['tokens']} tokens, {speed:.1f} tokens/s{kept}", file=sys.stderr)
