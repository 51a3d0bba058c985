"""magellano generate RUN --prompt TEXT"""

import argparse
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

HELP = "continue a prompt with a release, token by token"


def run_argument(parser: argparse.ArgumentParser) -> None:
    """RUN, which evaluate and generate share."""
    what = "a release: its folder, the start of its key, a profile's name (its newest), or PROFILE@promoted"
    parser.add_argument("run", metavar="RUN", help=what)


def arguments(parser: argparse.ArgumentParser) -> None:
    run_argument(parser)
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max-tokens", type=int, default=128, metavar="N", help="stop after N tokens (default 128)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default: the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="choose among the K likeliest (0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="choose among the likeliest that make P")
    parser.add_argument("--seed", type=int, default=0, help="same seed, same text")


def run(args: argparse.Namespace) -> dict[str, Any]:
    import time

    from magellano.generate import Sampling, generate, text
    from magellano.runs import Release

    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    release = Release.find(args.run)
    from magellano.loader import load_release
    from magellano.tokenizer import Tokenizer

    model = load_release(release.folder, release.base)
    tokenizer = Tokenizer.load(release.folder)
    made: list[int] = []
    pieces: list[str] = []
    started = time.perf_counter()
    tokens = generate(model, tokenizer.encode(args.prompt), tokenizer.end_of_text, args.max_tokens, sampling)
    for piece in text(_remembered(tokens, made), tokenizer.decode_bytes):
        pieces.append(piece)
        if not args.json:
            sys.stdout.write(piece)
            sys.stdout.flush()
    return {
        "release": str(release.folder),
        "prompt": args.prompt,
        "text": "".join(pieces),
        "tokens": len(made),
        "seconds": time.perf_counter() - started,
    }


def _remembered(tokens: Any, made: list[int]) -> Any:
    for token in tokens:
        made.append(token)
        yield token


def show(facts: dict[str, Any], console: "Console") -> None:
    """The text has been printed as it was made; its end and its speed are what is left."""
    console.print()
    speed = facts["tokens"] / facts["seconds"] if facts["seconds"] else 0.0
    print(f"{facts['tokens']} tokens, {speed:.1f} tokens/s", file=sys.stderr)
