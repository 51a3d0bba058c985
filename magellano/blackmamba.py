"""BlackMamba (Anthony et al. 2024, arXiv 2402.01771), read into ours: config.json and pytorch_model.bin as published.

Mamba-1 layers, every few of them one of experts: top-1 by a router with a bias, weighted by the sigmoid of its logit
(the paper's Sinkhorn balancing is of training alone); gated experts without biases; RMS norms, but a LayerNorm at the
end; the head is the embedding. Its pickle is read as tensors alone (torch_file.py).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from magellano import files, foreign, loader
from magellano.backend import mx
from magellano.errors import InputError
from magellano.layout import EMBEDDING, ParamSpec, parameters
from magellano.names import FinalNorm, Gate, Hidden
from magellano.profile import ModelConfig
from magellano.torch_file import TorchFile

WEIGHTS = "pytorch_model.bin"
REMEDY = f"give a BlackMamba's folder: config.json, {WEIGHTS} and GPT-NeoX's tokenizer.json"
MARK = "mamba_moe_layers"  # the key of config.json that tells: "r" for a Mamba layer, else the number of experts
GLU = {"silu": Hidden.SWIGLU, "gelu": Hidden.GEGLU}
# As in foreign.py; what the authors' code takes from config.json must be there, the rest is what it computes with.
FIXED = {"add_bias_linear": False, "swiglu": True}
ASSUMED = {"rms_norm": True, "conv_bias": True, "routing_mode": "sinkhorn", "layernorm_epsilon": 1e-5}


@dataclass(frozen=True)
class BlackMamba(foreign.Foreign):
    """One in a folder, its config checked and no tensor read."""

    def source(self) -> Callable[[ParamSpec], mx.array]:
        """Gives each parameter once, as stored. InputError where the file is not what config.json says, or torch is
        not installed.
        """
        held = TorchFile(self.folder / WEIGHTS, REMEDY)
        shapes: dict[str, tuple[int, ...]] = {}
        for spec in parameters(self.config):
            shapes |= dict.fromkeys(theirs(spec), spec.shape[1:] if _stacked(spec) else spec.shape)
        held.check(shapes)

        def take(spec: ParamSpec) -> mx.array:
            values = [held.take(name) for name in theirs(spec)]
            value = mx.stack(values) if _stacked(spec) else values[0]
            mx.eval(value)
            return value

        return take


def read(folder: Path, glu: str | None) -> BlackMamba:
    """The model in `folder`. `glu`: what its experts' gates compute, on which its sources differ. InputError where it
    is none that we have.
    """
    path = folder / loader.CONFIG
    data = files.read_json(path, REMEDY)
    for key, wanted in (FIXED | ASSUMED).items():
        found = data.get(key, ASSUMED.get(key))
        if found != wanted or type(found) is not type(wanted):
            raise InputError(f"{path}: {key} is {files.shown(found)}; only {wanted} is known here")
    if glu is None:
        raise InputError(
            f"{path}: a BlackMamba: paper and config say SwiGLU, its authors' code computes gelu; say which with --glu "
            "silu or --glu gelu, the one with the lower loss on plain text"
        )
    try:
        config = ModelConfig.model_validate(_shape(data, GLU[glu]))
        loader.check_sizes(config)
    except (KeyError, TypeError, ValueError, ValidationError) as e:
        raise InputError(f"{path}: {files.told(e)}; {REMEDY}") from None
    return BlackMamba(folder, config, 0)  # GPT-NeoX's end-of-text


def _shape(data: dict[str, Any], hidden: Hidden) -> dict[str, Any]:
    d, layers = data["hidden_size"], data[MARK]
    if type(d) is not int or not isinstance(layers, list) or not all(isinstance(kind, str) for kind in layers):
        raise ValueError(f"hidden_size must be a whole number and {MARK} a list of strings")
    if len(layers) != data["num_layers"]:
        raise ValueError(f"{MARK} has {len(layers)} entries, num_layers is {files.shown(data['num_layers'])}")
    every = next((n for n, kind in enumerate(layers, 1) if kind != "r"), len(layers) + 1)
    experts = layers[every - 1] if every <= len(layers) else "1"
    regular = [experts if n % every == 0 else "r" for n in range(1, len(layers) + 1)]
    if layers != regular or (every <= len(layers) and experts not in tuple("23456789")):  # "1" is no mixture there
        raise ValueError(f"{MARK}: only 2 to 9 experts, the same at even distances after Mamba layers, are known here")
    return {
        "d_model": d,
        "n_layers": len(layers),
        "n_experts": int(experts),
        "top_k": 1,
        "d_ff": data["ffn_hidden_size"],
        "d_state": data["state_size"],
        "d_conv": data["conv_dimension"],
        "expand": data["expansion_factor"],
        "dt_rank": math.ceil(d / 16),
        "vocab_size": data["vocab_size"],
        "moe_every": every,
        "norm_eps": ASSUMED["layernorm_epsilon"],
        "tied": True,
        "hidden": hidden,
        "gate": Gate.SIGMOID,
        "final_norm": FinalNorm.LAYER,
    }


def _stacked(spec: ParamSpec) -> bool:
    return ".experts." in spec.name


def theirs(spec: ParamSpec) -> list[str]:
    """Their names of a parameter: one, or one for each expert."""
    name = spec.name
    if name == EMBEDDING:
        return ["embedding.word_embeddings.weight"]
    if name.startswith("backbone.norm_f."):
        return [name.replace("backbone.norm_f", "decoder.final_layernorm")]
    name = name.replace("backbone.", "decoder.")
    for ours, fc in ((".experts.w1.", ".linear_fc1."), (".experts.w2.", ".linear_fc2.")):
        if ours in name:
            return [name.replace(ours, f".local_experts.{e}{fc}") for e in range(spec.shape[0])]
    return [name]
