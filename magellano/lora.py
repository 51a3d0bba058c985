"""Adapters on a model: attaching them, naming them as PEFT does, reading and writing them.

LoRA (Hu et al. 2021, arXiv 2106.09685): A starts uniform in +-1/sqrt(in), B at zero, so that the start changes nothing.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path

from magellano import init
from magellano.backend import mx
from magellano.errors import InputError
from magellano.layout import EMBEDDING, ParamSpec, lora_shapes, parameters
from magellano.linear import Adapted
from magellano.model import MagellanoLM
from magellano.names import LoraTarget
from magellano.profile import LoraConfig, ModelConfig
from magellano.tensors import load_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's file names
PREFIX = "base_model.model."


def start(config: ModelConfig, lora: LoraConfig) -> dict[str, mx.array]:
    """The adapter before training, by parameter name in our own naming ("NAME.lora_a"); float32 and lazy."""
    tensors = {}
    for spec, a_shape, b_shape in _targets(config, lora):
        bound = 1 / math.sqrt(a_shape[-1])
        path = module_path(spec)
        tensors[f"{path}.lora_a"] = mx.random.uniform(-bound, bound, a_shape, key=init.key(lora.seed, f"{path}.lora_a"))
        tensors[f"{path}.lora_b"] = mx.zeros(b_shape)
    return tensors


def attach(model: MagellanoLM, lora: LoraConfig, tensors: dict[str, mx.array]) -> None:
    """Put the adapter `tensors` on `model`, freeze everything else. InputError where names or shapes disagree."""
    model.freeze()
    expected = set()
    for spec, a_shape, b_shape in _targets(model.config, lora):
        path = module_path(spec)
        expected |= {f"{path}.lora_a", f"{path}.lora_b"}
        for name, shape in ((f"{path}.lora_a", a_shape), (f"{path}.lora_b", b_shape)):
            if name not in tensors or tuple(tensors[name].shape) != shape:
                found = tensors[name].shape if name in tensors else "nothing"
                raise InputError(
                    f"adapter: {name} should have shape {shape}, found {found}; attach it to the model it was made for"
                )
        module = find(model, path)
        module.attach(tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"], lora.alpha / lora.rank_of(_target(spec)))
        module.unfreeze(keys=["lora_a", "lora_b"], recurse=False)
    if extra := sorted(set(tensors) - expected):
        raise InputError(f"adapter: {extra[0]} belongs to no target of this model; {len(extra)} such tensors")


def find(model: MagellanoLM, path: str) -> Adapted:
    """The projection at a dotted path."""
    module = model
    for part in path.split("."):
        module = module[int(part)] if isinstance(module, list) else module[part]
    assert isinstance(module, Adapted), path
    return module


def module_path(spec: ParamSpec) -> str:
    return spec.name.removesuffix(".weight")


def save(folder: Path, config: ModelConfig, lora: LoraConfig, tensors: dict[str, mx.array], base: str = "") -> None:
    """Write adapter_config.json and adapter_model.safetensors as PEFT names them, experts one by one."""
    out = {}
    for name, value in tensors.items():
        path, part = name.rsplit(".", 1)
        for peft, piece in _unrolled(path, value):
            out[f"{PREFIX}{peft}.{'lora_A' if part == 'lora_a' else 'lora_B'}.weight"] = piece
    mx.save_safetensors(str(folder / WEIGHTS), out, metadata={"format": "pt"})
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "target_modules": ["lm_head" if t == "head" else str(t) for t in lora.targets],
        "rank_pattern": {"lm_head" if t == "head" else str(t): r for t, r in lora.ranks.items()},
        "alpha_pattern": {"lm_head" if t == "head" else str(t): lora.alpha for t in lora.ranks},
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "magellano": {"lora": lora.model_dump(mode="json")},
    }
    (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load(folder: Path, config: ModelConfig) -> tuple[LoraConfig, dict[str, mx.array]]:
    """Read what `save` wrote: the settings and the tensors in our own naming, evaluated."""
    try:
        description = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        lora = LoraConfig.model_validate(description["magellano"]["lora"])
    except FileNotFoundError:
        raise InputError(f"{folder}: no {CONFIG}; not an adapter folder") from None
    except (KeyError, ValueError) as e:
        raise InputError(f"{folder / CONFIG}: not an adapter made here: {e}") from None
    files = dict(load_file(folder / WEIGHTS))
    tensors = {}
    for spec, a_shape, b_shape in _targets(config, lora):
        path = module_path(spec)
        for part, peft, shape in (("lora_a", "lora_A", a_shape), ("lora_b", "lora_B", b_shape)):
            names = [f"{PREFIX}{p}.{peft}.weight" for p in _peft_paths(path, shape)]
            if missing := [n for n in names if n not in files]:
                raise InputError(f"{folder / WEIGHTS}: tensor {missing[0]} is missing")
            pieces = [files.pop(n) for n in names]
            tensors[f"{path}.{part}"] = mx.stack(pieces) if len(shape) == 3 else pieces[0]
    mx.eval(tensors)
    return lora, tensors


def _targets(config: ModelConfig, lora: LoraConfig) -> Iterator[tuple[ParamSpec, tuple[int, ...], tuple[int, ...]]]:
    for spec in parameters(config):
        if shapes := lora_shapes(spec, lora):
            yield spec, *shapes


def _target(spec: ParamSpec) -> LoraTarget:
    assert spec.target is not None
    return spec.target


def _peft_paths(path: str, shape: tuple[int, ...]) -> list[str]:
    """PEFT's module paths for ours: the tied head by its own name, an expert stack as one module per expert."""
    if path == EMBEDDING.removesuffix(".weight"):
        return ["lm_head"]
    if len(shape) == 2:
        return [path]
    stem, matrix = path.rsplit(".", 1)
    return [f"{stem}.{e}.{matrix}" for e in range(shape[0])]


def _unrolled(path: str, value: mx.array) -> Iterator[tuple[str, mx.array]]:
    names = _peft_paths(path, tuple(value.shape))
    return zip(names, [value[e] for e in range(len(names))] if value.ndim == 3 else [value], strict=True)
