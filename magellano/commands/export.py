"""magellano export RUN --to mlx-lm FOLDER"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from magellano.commands.generate import run_argument

if TYPE_CHECKING:
    from rich.console import Console

    from magellano.commands.chosen import Chosen

HELP = "write a release as a folder that another library runs: merged for mlx-lm, or its adapter for PEFT"
DTYPES = ("bfloat16", "float16", "float32")


def arguments(parser: argparse.ArgumentParser) -> None:
    run_argument(parser)
    parser.add_argument("--to", required=True, choices=["mlx-lm", "peft"], help="which library")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to; it must be empty or new")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="of the weights (default bfloat16)")
    chat = "with the chat template of its training; by default where the release was trained on chats"
    parser.add_argument("--chat", action=argparse.BooleanOptionalAction, default=None, help=chat)


def run(args: argparse.Namespace) -> dict[str, Any]:
    import time

    from magellano.commands.chosen import Chosen
    from magellano.data import rules

    chosen = Chosen.find(args.run)
    if args.to == "peft":
        return _peft(chosen, args.folder)
    from magellano import export

    started = time.perf_counter()
    template = None if args.chat is False else chosen.template()
    ours = chosen.release is not None and rules.chats_as_ours(chosen.release.profile.data)
    chat = (template is not None or ours) if args.chat is None else args.chat
    facts = export.mlx_lm(args.folder, chosen.model("float32"), chosen.tokenizer(), args.dtype, chat, template)
    return {"release": str(chosen.folder), "to": args.to, **facts, "seconds": time.perf_counter() - started}


def _peft(chosen: "Chosen", folder: Path) -> dict[str, Any]:
    """The adapter alone."""
    from magellano import loader, lora, peft_adapter, writing
    from magellano.errors import InputError

    if chosen.release is None:
        raise InputError(f"{chosen.folder}: no adapter in it; --to peft takes a release")
    config, _ = loader.read_config(chosen.release.base)
    settings, tensors = lora.load(chosen.folder, config)
    with writing.folder(folder) as own:
        peft_adapter.write(own, config, settings, tensors, chosen.release.profile.base.folder)
    size = sum(value.nbytes for value in tensors.values())
    return {"release": str(chosen.folder), "to": "peft", "folder": str(folder), "bytes": size}


def show(facts: dict[str, Any], console: "Console") -> None:
    if facts["to"] == "peft":
        console.print(f"{facts['folder']}: {facts['bytes'] / 1e6:.1f} MB; PeftModel.from_pretrained(base, FOLDER)")
        return
    console.print(f"{facts['folder']}: {facts['bytes'] / 1e9:.2f} GB in {facts['dtype']}, {facts['seconds']:.1f} s")
    folder = facts["folder"]
    console.print(
        f"mlx_lm.generate --model {folder} --trust-remote-code --prompt TEXT", soft_wrap=True, highlight=False
    )
