"""magellano import FOLDER OUT"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from magellano.foreign import Foreign
    from magellano.profile import ModelConfig
    from magellano.tokenizer import Tokenizer
    from magellano.upcycle import Take

HELP = "read a Mamba model of transformers, or a PEFT adapter onto one, into a model folder; or grow experts on one"


def arguments(parser: argparse.ArgumentParser) -> None:
    what = "a Mamba or Falcon-Mamba model in safetensors, a BlackMamba, or a model folder made here"
    parser.add_argument("folder", type=Path, metavar="FOLDER", help=what)
    parser.add_argument("out", type=Path, metavar="OUT", help="where to; it must be empty or new")
    glu = "of a BlackMamba's experts: its paper says silu (SwiGLU), its authors' code computes gelu"
    parser.add_argument("--glu", choices=("silu", "gelu"), help=glu)
    base = "with a PEFT adapter as FOLDER: the imported model that it is merged into"
    parser.add_argument("--base", type=Path, metavar="MODEL", help=base)
    grow = parser.add_argument_group("sparse upcycling: the same logits, with experts to train")
    grow.add_argument("--experts", type=int, metavar="E", help="behind every few Mamba layers E feed-forwards")
    grow.add_argument("--top-k", type=int, default=2, metavar="K", help="experts for each token (default 2)")
    grow.add_argument("--d-ff", type=int, metavar="F", help="width of an expert (default 4 * d_model)")
    grow.add_argument("--moe-every", type=int, default=4, metavar="N", help="every Nth layer has experts (default 4)")
    grow.add_argument("--layers", type=int, metavar="L", help="layers in all (default: all Mamba layers stay)")
    grow.add_argument("--seed", type=int, default=0, help="of what is new")


def run(args: argparse.Namespace) -> dict[str, Any]:
    from magellano import blackmamba, files, foreign, loader, lora, upcycle, writing
    from magellano.errors import InputError

    if args.base is not None:
        return _adapter(args)
    if (args.folder / lora.CONFIG).exists():
        raise InputError(f"{args.folder}: an adapter; say what it is for: --base MODEL, a folder that import wrote")
    known = files.read_json(args.folder / loader.CONFIG, foreign.REMEDY)
    if args.glu is not None and blackmamba.MARK not in known:
        raise InputError(f"--glu {args.glu}: {args.folder} is no BlackMamba; leave it out")
    if known.get("model_type") == "magellano":
        if args.experts is None:
            raise InputError(f"{args.folder}: a model of this project already; --experts grows experts on it")
        config, take, tokenizer = _ours(args.folder)
    else:
        here = blackmamba.MARK in known
        model = blackmamba.read(args.folder, args.glu) if here else foreign.read(args.folder)
        config, take, tokenizer = model.config, model.source(), _tokenizer(model)
    new = config if args.experts is None else grown(config, args)
    with writing.folder(args.out) as own:
        loader.write_model(own, new, upcycle.tensors(config, new, take, args.seed), quantized=False)
        tokenizer.save(own)
    from magellano.layout import count

    shape = new.model_dump(mode="json")
    return {"folder": str(args.out), "from": str(args.folder), "parameters": count(new), "model": shape}


def _adapter(args: argparse.Namespace) -> dict[str, Any]:
    """A PEFT adapter merged into a model of ours, in that one's types."""
    from magellano import loader, lora, merge, peft_adapter, writing
    from magellano.errors import InputError
    from magellano.layout import count

    if args.experts is not None:
        raise InputError("--experts and --base: merge the adapter first, then grow experts on the result")
    config, take, tokenizer = _ours(args.base)
    from magellano.linear import array
    from magellano.model import MagellanoLM

    model = MagellanoLM(config, take)
    settings, tensors = peft_adapter.read(args.folder, config, lora.base_of_model(model))
    dtype = array(model.backbone.embeddings.base).dtype
    lora.attach(model, settings, tensors)
    with writing.folder(args.out) as own:
        loader.write_model(own, config, merge.tensors(model, dtype), quantized=False)
        tokenizer.save(own)
    facts = {"folder": str(args.out), "from": str(args.folder), "base": str(args.base), "parameters": count(config)}
    return {**facts, "model": config.model_dump(mode="json")}


def _ours(folder: Path) -> tuple["ModelConfig", "Take", "Tokenizer"]:
    from magellano import loader
    from magellano.errors import InputError
    from magellano.layout import parameters
    from magellano.tokenizer import Tokenizer

    config, _ = loader.read_config(folder)
    source = loader.Files(folder)
    if any(f"{spec.name}.codes" in source for spec in parameters(config)):
        raise InputError(f"{folder}: its weights are in 4 bits; give the dense model")
    return config, lambda spec: source.take(spec.name, spec.shape), Tokenizer.load(folder)


def _tokenizer(model: "Foreign") -> "Tokenizer":
    from magellano.hf_tokenizer import FILE, Foreign

    return Foreign(model.folder / FILE, model.config.vocab_size, model.end_of_text)


def grown(config: "ModelConfig", args: argparse.Namespace) -> "ModelConfig":
    """The shape with experts. InputError where it is none."""
    from pydantic import ValidationError

    from magellano import files, upcycle
    from magellano.errors import InputError
    from magellano.foreign import is_dense
    from magellano.profile import ModelConfig

    changes = {"n_experts": args.experts, "top_k": min(args.top_k, args.experts)}
    if is_dense(config):
        every = args.moe_every
        layers = args.layers or config.n_layers + config.n_layers // max(1, every - 1)
        changes |= {"n_layers": layers, "moe_every": every, "d_ff": args.d_ff or 4 * config.d_model}
    elif args.layers is not None or args.d_ff is not None:
        raise InputError("--layers and --d-ff belong to a model without experts; leave them out")
    try:
        new = ModelConfig.model_validate({**config.model_dump(), **changes})
    except ValidationError as e:
        raise InputError(f"upcycling: {files.told(e)}") from None
    upcycle.check(config, new)
    return new


def show(facts: dict[str, Any], console: "Console") -> None:
    shape = facts["model"]
    console.print(
        f"{facts['folder']}: {facts['parameters'] / 1e6:,.1f} M parameters, {shape['n_layers']} layers, d_model "
        f"{shape['d_model']}, vocabulary {shape['vocab_size']:,}",
        soft_wrap=True,
        highlight=False,
    )
    console.print(f'in a profile: [base] source = "folder", folder = "{facts["folder"]}"', markup=False, soft_wrap=True)
