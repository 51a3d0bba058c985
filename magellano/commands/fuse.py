"""magellano fuse RUN OUT"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magellano.commands.generate import run_argument

if TYPE_CHECKING:
    from rich.console import Console

HELP = "merge a release's adapter into its base, and refuse where that loses it"
CALIBRATION = 8192  # tokens of the training split


def arguments(parser: argparse.ArgumentParser) -> None:
    run_argument(parser)
    parser.add_argument("out", type=Path, metavar="OUT", help="the model folder to write; it must be empty or new")
    parser.add_argument("--bits", type=int, choices=[4, 16], default=16, help="16, the default, or NF4 again")
    sixteen = "of 16 bits (default bfloat16)"
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16", help=sixteen)
    bound = "how far loss and predictions may move on the held-out split, nats a token (default 0.02)"
    parser.add_argument("--bound", type=float, default=0.02, metavar="X", help=bound)
    calibration = f"with 4 bits: training tokens whose inputs decide the rounding (default {CALIBRATION})"
    parser.add_argument("--calibration", type=int, default=CALIBRATION, metavar="N", help=calibration)
    parser.add_argument("--max-tokens", type=int, default=0, metavar="N", help="of the held-out split (0: all)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    import time

    from magellano.errors import InputError
    from magellano.runs import Release

    if not 0 < args.bound < float("inf") or args.calibration < 1:
        raise InputError(f"--bound {args.bound} and --calibration {args.calibration} must be above 0")
    release = Release.find(args.run)
    from magellano import fuse, loader, merge, writing
    from magellano.data.shards import Shards
    from magellano.data.template import Template
    from magellano.export import DTYPES
    from magellano.tokenizer import Tokenizer

    started = time.perf_counter()
    tokens, batch = release.tokens, release.profile.evaluate.batch
    model = loader.load_release(release.folder, release.base, release.profile.train.compute)
    errors: fuse.Errors = {}
    with writing.folder(args.out) as own:
        if args.bits == 4:
            tensors = fuse.requantized(model, list(batches(Shards(tokens, "train"), batch, args.calibration)), errors)
        else:
            tensors = merge.tensors(model, DTYPES[args.dtype])
        loader.write_model(own, model.config, tensors, quantized=args.bits == 4)
        Tokenizer.load(release.folder).save(own)
        if template := Template.kept(release.folder):
            template.keep(own)
        fused = loader.load_model(own, release.profile.train.compute)
        cost = fuse.cost(model, fused, batches(Shards(tokens, "held_out"), batch, args.max_tokens))
        if why := cost.too_much(args.bound):
            remedy = "fuse with --bits 16" if args.bits == 4 else "serve base and adapter as they are"
            raise InputError(f"{release.folder}: {why}; {remedy}, or raise --bound")
    facts = {"release": str(release.folder), "folder": str(args.out), "bits": args.bits, "bound": args.bound}
    return {**facts, **cost.to_dict(), **_shares(errors), "seconds": time.perf_counter() - started}


def batches(split: Any, batch: int, tokens: int) -> Any:
    """The split's first rows, up to the one that reaches `tokens` positions (0: all)."""
    rows = split.rows if tokens == 0 else min(split.rows, -(-tokens // split.seq_len))
    for first in range(0, rows, batch):
        yield split.batch(range(first, min(first + batch, rows)))


def _shares(errors: dict[str, tuple[float, float]]) -> dict[str, float]:
    if not errors:
        return {}
    carried, nearest = (sum(each) / len(errors) for each in zip(*errors.values(), strict=True))
    return {"error_share": carried, "error_share_nearest": nearest}


def show(facts: dict[str, Any], console: "Console") -> None:
    from rich.table import Table

    table = Table("held-out, nats a token", "base", "base + adapter", "fused")
    loss = [f"{facts[f'loss_{which}']:.4f}" for which in ("base", "adapted", "fused")]
    table.add_row("loss", *loss)
    divergence = [f"{facts['divergence_base']:.4f}", "0", f"{facts['divergence_fused']:.4f}"]
    table.add_row("divergence from base + adapter", *divergence)
    console.print(table)
    bound = f"bound {facts['bound']:g} held on {facts['tokens']:,} tokens"
    console.print(f"{facts['folder']}: {facts['bits']} bits; {bound}; {facts['seconds']:.1f} s", soft_wrap=True)
