"""Models from elsewhere, read into ours: `MambaForCausalLM` and `FalconMambaForCausalLM` as transformers writes them,
or mlx-lm, which turns the convolution's weight.

Files go through the same checks as our own: strict JSON, safetensors headers against the shapes that config.json asks
for, no links, nothing pickled. What a config asks for and we do not have is an InputError, not a guess.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from magellano import files, loader
from magellano.backend import mx
from magellano.errors import InputError
from magellano.layout import EMBEDDING, HEAD, ParamSpec, parameters
from magellano.profile import ModelConfig

REMEDY = "give a folder with a Mamba or Falcon-Mamba model as transformers or mlx-lm saves it, in safetensors"
KINDS = ("mamba", "falcon_mamba")
# What must have one value for the model to be ours, and the value where a config.json leaves it out.
FIXED = {"hidden_act": "silu", "use_bias": False, "use_conv_bias": True, "rms_norm": True}


@dataclass(frozen=True)
class Foreign:
    """A foreign model's shape in our terms and what else its config.json says of use: its end-of-text tokens."""

    folder: Path
    config: ModelConfig
    end_of_text: int

    def source(self) -> Callable[[ParamSpec], mx.array]:
        """Gives each parameter once, as stored. InputError where the files are not what config.json says, or a tied
        model has a head that is not its embedding.
        """
        config = self.config
        head = {HEAD: (config.vocab_size, config.d_model)} if config.tied else None
        convolutions = [s for s in parameters(config) if s.name.endswith(".conv1d.weight")]
        held = loader.Files(self.folder, config, head, {s.name: _turned(s.shape) for s in convolutions})

        def take(spec: ParamSpec) -> mx.array:
            value = held.take(spec.name)
            if value.shape != spec.shape:
                value = mx.contiguous(value.swapaxes(1, 2))
            second = held.take(HEAD) if spec.name == EMBEDDING and config.tied and HEAD in held else value
            if not mx.array_equal(second, value).item():
                what = "tie_word_embeddings is true, but lm_head is another matrix"
                raise InputError(f"{self.folder}: {what}; {REMEDY}")
            return value

        return take


def _turned(shape: tuple[int, ...]) -> tuple[int, ...]:
    channels, one, width = shape
    return channels, width, one


def read(folder: Path) -> Foreign:
    """The model in `folder`, its config checked and no tensor read. InputError where it is none that we have."""
    path = folder / loader.CONFIG
    data = files.read_json(path, REMEDY)
    if "mamba_moe_layers" in data:
        raise InputError(f"{path}: a BlackMamba: magellano.blackmamba reads it, `magellano import` for you")
    kind = data.get("model_type")
    if kind not in KINDS:
        raise InputError(f"{path}: model_type {files.shown(kind)} is not one of {', '.join(KINDS)}; {REMEDY}")
    for key, wanted in FIXED.items():
        if (found := data.get(key, wanted)) != wanted or type(found) is not type(wanted):
            raise InputError(f"{path}: {key} is {files.shown(found)}; only {wanted} is known here")
    try:
        config = ModelConfig.model_validate(_shape(data, kind))
        loader.check_sizes(config)
        end = data.get("eos_token_id", 0)
        end = end[0] if isinstance(end, list) and end else end
        if type(end) is not int or not 0 <= end < config.vocab_size:
            raise ValueError(f"eos_token_id {files.shown(end)} is not a token of {config.vocab_size}")
    except (KeyError, TypeError, ValueError, ValidationError) as e:
        raise InputError(f"{path}: {files.told(e)}; {REMEDY}") from None
    return Foreign(folder, config, end)


def _shape(data: dict[str, Any], kind: str) -> dict[str, Any]:
    d, layers = data["hidden_size"], data["num_hidden_layers"]
    rank, expand = data.get("time_step_rank", "auto"), data.get("expand", 2)
    if type(d) is not int or type(layers) is not int:
        raise ValueError("hidden_size and num_hidden_layers must be whole numbers")
    if isinstance(expand, float) and expand.is_integer():
        expand = int(expand)
    if (inner := data.get("intermediate_size")) is not None:  # it counts, whatever expand says: falcon-mamba-7b has 16
        if type(inner) is not int or inner % max(d, 1):
            raise ValueError(f"intermediate_size {files.shown(inner)} is no multiple of hidden_size")
        expand = inner // max(d, 1)
    falcon = {"dt_norm_eps": float(data.get("mixer_rms_eps", 1e-6))} if kind == "falcon_mamba" else {}
    return {
        **dense(layers),
        "d_model": d,
        "d_state": data.get("state_size", 16),
        "d_conv": data.get("conv_kernel", 4),
        "expand": expand,
        "dt_rank": math.ceil(d / 16) if rank == "auto" else rank,
        "vocab_size": data["vocab_size"],
        "norm_eps": float(data.get("layer_norm_epsilon", 1e-5)),
        "tied": data.get("tie_word_embeddings", True),
        **falcon,
    }


def dense(layers: int) -> dict[str, int]:
    """The keys of a shape without experts: the first MoE layer would come behind the last."""
    return {"n_layers": layers, "moe_every": layers + 1, "n_experts": 1, "top_k": 1, "d_ff": 1}


def is_dense(config: ModelConfig) -> bool:
    return config.moe_every > config.n_layers
