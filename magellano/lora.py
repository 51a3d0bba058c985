"""Adapters on a model: attaching them, naming them as PEFT does, reading and writing them.

LoRA (Hu et al. 2021, arXiv 2106.09685): A starts uniform in +-1/sqrt(in), B at zero, so that the start changes nothing.
DoRA (Liu et al. 2024, arXiv 2402.09353): the rows of W + s B A have lengths m of their own, at first those they have.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from magellano import files, init
from magellano.backend import mx
from magellano.errors import InputError
from magellano.headers import Header
from magellano.layout import EMBEDDING, ParamSpec, adapter_shapes, parameters
from magellano.linear import Adapted, Weight, row_norms, squares
from magellano.model import MagellanoLM
from magellano.names import LoraKind, LoraTarget, Stage
from magellano.profile import LoraConfig, ModelConfig
from magellano.tensors import load_file

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # PEFT's file names
PREFIX = "base_model.model."
PEFT = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "lora_m": "lora_magnitude_vector"}
Base = Callable[[ParamSpec], Weight]
RANK = 1 << 16  # that an adapter_config.json may ask for
REMEDY = "give the folder of an adapter that was made here, or make it again"


def start(config: ModelConfig, lora: LoraConfig, base: Base | None = None) -> dict[str, mx.array]:
    """The adapter before training, by parameter name in our own naming ("NAME.lora_a"); float32, A and B lazy. DoRA
    needs the weights of the `base`.
    """
    tensors = factors(config, lora)
    return tensors if lora.kind is LoraKind.LORA else tensors | magnitudes(config, lora, tensors, base)


def factors(config: ModelConfig, lora: LoraConfig) -> dict[str, mx.array]:
    """A and B of `start`."""
    tensors = {}
    for spec, shapes in _targets(config, lora):
        a_shape, path = shapes["lora_a"], module_path(spec)
        bound = 1 / math.sqrt(a_shape[-1])
        tensors[f"{path}.lora_a"] = mx.random.uniform(-bound, bound, a_shape, key=init.key(lora.seed, f"{path}.lora_a"))
        tensors[f"{path}.lora_b"] = mx.zeros(shapes["lora_b"])
    return tensors


def magnitudes(
    config: ModelConfig, lora: LoraConfig, tensors: dict[str, mx.array], base: Base | None
) -> dict[str, mx.array]:
    """DoRA's m with which the factors `tensors` on `base` make W + s B A as it is; evaluated, a matrix at a time."""
    assert base is not None, "the rows' lengths are those of a base"
    found = {}
    for spec, shapes in _targets(config, lora):
        weight, path = base(spec), module_path(spec)
        a, b = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
        norms = row_norms(weight, squares(weight), a, b, scale(lora, _target(spec), spec.layer))
        found[f"{path}.lora_m"] = norms.reshape(shapes["lora_m"])
        mx.clear_cache()
    return found


def base_of_model(model: MagellanoLM) -> Base:
    """The weights below the adapters of `model`."""
    return lambda spec: find(model, module_path(spec)).base


def attach(model: MagellanoLM, lora: LoraConfig, tensors: dict[str, mx.array]) -> None:
    """Put the adapter `tensors` on `model` in the place of one that was there, freeze everything else. InputError where
    names or shapes disagree.
    """
    targets = list(_targets(model.config, lora))
    expected = {f"{module_path(spec)}.{part}": shape for spec, shapes in targets for part, shape in shapes.items()}
    for name, shape in expected.items():
        if name not in tensors or tuple(tensors[name].shape) != shape:
            found = tensors[name].shape if name in tensors else "nothing"
            raise InputError(
                f"adapter: {name} should have shape {shape}, found {found}; attach it to the model it was made for"
            )
    if extra := sorted(set(tensors) - set(expected)):
        raise InputError(f"adapter: {extra[0]} belongs to no target of this model; {len(extra)} such tensors")
    detach(model)
    for spec, shapes in targets:
        path = module_path(spec)
        a, b, *m = (tensors[f"{path}.{part}"] for part in shapes)
        module = find(model, path)
        module.attach(a, b, scale(lora, _target(spec), spec.layer), *m)
        module.unfreeze(keys=list(shapes), recurse=False)


def detach(model: MagellanoLM) -> None:
    """Take the adapter off `model`, if there is one, and freeze everything."""
    for _, module in model.named_modules():
        if isinstance(module, Adapted):
            module.detach()
    model.freeze()


def scale(lora: LoraConfig, target: LoraTarget, layer: int | None = None) -> float:
    """s in W + s B A. With alpha / sqrt(rank) the step does not shrink as the rank grows."""
    rank = lora.rank_of(target, layer)
    return lora.alpha / (math.sqrt(rank) if lora.rslora else rank)


def settings_of(config: ModelConfig, ranks: Mapping[str, int], kind: LoraKind = LoraKind.LORA) -> LoraConfig:
    """The settings with these ranks by parameter and alpha 1; 1 for the other parameters of the same targets."""
    specs = {spec.name: spec for spec in parameters(config) if spec.target is not None}
    most: dict[LoraTarget, int] = {}
    for name, rank in ranks.items():
        most[_target(specs[name])] = max(rank, most.get(_target(specs[name]), 0))
    pattern = {}
    for spec in specs.values():
        if (target := _target(spec)) in most and spec.layer is not None and ranks.get(spec.name, 1) != most[target]:
            pattern[f"layers.{spec.layer}.{target}"] = ranks.get(spec.name, 1)
    return LoraConfig(
        kind=kind, rank=max(most.values()), alpha=1.0, targets=tuple(most), ranks=most, rank_pattern=pattern
    )


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
            out[f"{PREFIX}{peft}.{PEFT[part]}"] = piece.reshape(-1) if part == "lora_m" else piece
    mx.save_safetensors(str(folder / WEIGHTS), out, metadata={"format": "pt"})
    ranks = _pattern(config, lora)
    description = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.rslora,
        "use_dora": lora.kind is LoraKind.DORA,
        "target_modules": [_peft_name(target) for target in lora.targets],
        "rank_pattern": ranks,
        "alpha_pattern": dict.fromkeys(ranks, lora.alpha),
        "bias": "none",
        "lora_dropout": 0.0,
        "inference_mode": True,
        "magellano": {"lora": lora.model_dump(mode="json")},
    }
    (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def load(folder: Path, config: ModelConfig) -> tuple[LoraConfig, dict[str, mx.array]]:
    """Read what `save` wrote: the settings and the tensors in our own naming, evaluated.

    Names, shapes and types are compared with `config` and the settings before MLX sees the file. InputError where they
    differ or a file is not what it should be.
    """
    description = _description(folder)
    try:
        lora = LoraConfig.model_validate(description["magellano"]["lora"])
        if (rank := max(lora.rank, *lora.ranks.values(), *lora.rank_pattern.values(), 0)) > RANK:
            raise ValueError(f"rank {files.shown(rank)} is more than {RANK:,}")
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"{folder / CONFIG}: not an adapter made here: {files.told(e)}; {REMEDY}") from None
    stored = load_file(folder / WEIGHTS, lambda header: _check(folder / WEIGHTS, header, config, lora))
    tensors = {}
    for spec, shapes in _targets(config, lora):
        path = module_path(spec)
        for part, shape in shapes.items():
            pieces = [stored.pop(f"{PREFIX}{p}.{PEFT[part]}") for p in _peft_paths(path, shape)]
            tensors[f"{path}.{part}"] = (mx.stack(pieces) if len(shape) == 3 else pieces[0]).reshape(shape)
    mx.eval(tensors)
    return lora, tensors


def base_of(folder: Path) -> Path:
    """The base that the adapter in `folder` names, as releases name it: ../../STAGE/KEY, in the same artifact store.

    InputError for a name that leads anywhere else, through links too: loading a foreign adapter reads nothing but it.
    """
    name = _description(folder).get("base_model_name_or_path")
    where = f"{folder / CONFIG}: base_model_name_or_path {files.shown(name)}"
    if not isinstance(name, str) or not name:
        raise InputError(f"{where}: names no base; load it by its base's folder, or give a release")
    parts = name.split("/")
    plain = len(parts) == 4 and parts[:2] == ["..", ".."] and parts[2] in set(Stage)
    if not plain or parts[3] in ("", ".", "..") or not name.isprintable() or "\\" in name or len(name) > 255:
        raise InputError(f"{where}: leaves the artifact store; it must be ../../STAGE/KEY, as a release has it")
    base = folder.resolve().parent.parent / parts[2] / parts[3]
    if base.is_symlink() or base.parent.is_symlink():
        raise InputError(f"{where}: goes through a symbolic link; put the folder itself in its place")
    return base


def _description(folder: Path) -> dict[str, Any]:
    if not os.path.lexists(folder / CONFIG):
        raise InputError(f"{folder}: no {CONFIG}; not an adapter folder; {REMEDY}")
    return files.read_json(folder / CONFIG, REMEDY)


def _check(path: Path, header: Header, config: ModelConfig, lora: LoraConfig) -> None:
    """InputError unless `header` has the tensors of `lora` on `config` and no others."""
    extra = set(header)
    for spec, shapes in _targets(config, lora):
        for part, shape in shapes.items():
            for module in _peft_paths(module_path(spec), shape):
                name = f"{PREFIX}{module}.{PEFT[part]}"
                wanted = shape[-2:] if part != "lora_m" else shape[-2:-1] if len(shape) == 3 else shape
                if name not in header:
                    raise InputError(f"{path}: tensor {name} is missing; {REMEDY}")
                entry = header[name]
                if (entry.shape, entry.dtype) != (wanted, "F32"):
                    raise InputError(
                        f"{path}: tensor {name} is {entry.dtype} {entry.shape}, should have shape {wanted} and be F32; "
                        "use it with the model that it was made for"
                    )
                extra.discard(name)
    if extra:
        raise InputError(f"{path}: tensor {min(extra)} belongs to no target of {CONFIG}; {REMEDY}")


def _targets(config: ModelConfig, lora: LoraConfig) -> Iterator[tuple[ParamSpec, dict[str, tuple[int, ...]]]]:
    for spec in parameters(config):
        if shapes := adapter_shapes(spec, lora):
            yield spec, shapes


def _target(spec: ParamSpec) -> LoraTarget:
    assert spec.target is not None
    return spec.target


def _peft_name(target: LoraTarget) -> str:
    return "lm_head" if target is LoraTarget.HEAD else str(target)


def _pattern(config: ModelConfig, lora: LoraConfig) -> dict[str, int]:
    """PEFT's rank_pattern: by a target's name where all of its modules have one rank, else by their whole names, for
    PEFT takes the first name that a module's ends with.
    """
    of: dict[LoraTarget, dict[str, int]] = {}
    for spec, shapes in _targets(config, lora):
        modules, a_shape = of.setdefault(_target(spec), {}), shapes["lora_a"]
        modules |= dict.fromkeys(_peft_paths(module_path(spec), a_shape), a_shape[-2])
    found: dict[str, int] = {}
    for target, modules in of.items():
        same = {_peft_name(target): next(iter(modules.values()))} if len(set(modules.values())) == 1 else modules
        found |= {name: rank for name, rank in same.items() if rank != lora.rank}
    return found


def _peft_paths(path: str, shape: tuple[int, ...]) -> list[str]:
    """PEFT's module paths for ours: the tied head by its own name, an expert stack as one module per expert."""
    if path == EMBEDDING.removesuffix(".weight"):
        return ["lm_head"]
    if len(shape) < 3:
        return [path]
    stem, matrix = path.rsplit(".", 1)
    return [f"{stem}.{e}.{matrix}" for e in range(shape[0])]


def _unrolled(path: str, value: mx.array) -> Iterator[tuple[str, mx.array]]:
    names = _peft_paths(path, tuple(value.shape))
    return zip(names, [value[e] for e in range(len(names))] if value.ndim == 3 else [value], strict=True)
