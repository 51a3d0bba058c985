"""Model folders in Hugging Face's habit: config.json, model.safetensors or shards with an index; dense or NF4.

A quantised matrix NAME is stored as NAME.codes, NAME.scale_codes, NAME.scale_absmax, NAME.scale_offset; an expert
stack has each part stacked along the first axis.
"""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from magellano import lora
from magellano.backend import compute_dtype, mx, tree_flatten
from magellano.errors import InputError
from magellano.layout import ParamSpec, parameters
from magellano.linear import Weight
from magellano.model import MagellanoLM, Source
from magellano.nf4 import NF4Stack, NF4Tensor
from magellano.profile import ModelConfig
from magellano.tensors import load_file

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 1 << 30  # a shard is closed once it is larger


def write_model(folder: Path, config: ModelConfig, tensors: Iterable[tuple[str, mx.array]], quantized: bool) -> None:
    """Stream (name, tensor) pairs into safetensors shards; at most one shard is held. Then index and config.json."""
    shard: dict[str, mx.array] = {}
    where: dict[str, int] = {}
    held, total, shards = 0, 0, 1
    for name, value in tensors:
        mx.eval(value)
        if held and held + value.nbytes > SHARD_BYTES:
            mx.save_safetensors(str(folder / f"part-{shards:05d}.safetensors"), shard)
            shard, held, shards = {}, 0, shards + 1
            mx.clear_cache()
        shard[name], where[name] = value, shards
        held += value.nbytes
        total += value.nbytes
    mx.save_safetensors(str(folder / f"part-{shards:05d}.safetensors"), shard)
    if shards == 1:
        (folder / "part-00001.safetensors").rename(folder / SINGLE)
    else:
        names = {n: f"model-{n:05d}-of-{shards:05d}.safetensors" for n in range(1, shards + 1)}
        for n, file in names.items():
            (folder / f"part-{n:05d}.safetensors").rename(folder / file)
        index = {"metadata": {"total_size": total}, "weight_map": {name: names[n] for name, n in where.items()}}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    description = {
        "architectures": ["MagellanoLM"],
        "model_type": "magellano",
        "model": config.model_dump(mode="json"),
        "quantization": "nf4" if quantized else None,
    }
    (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's shape and the whole config.json. InputError where the folder is no model of ours."""
    try:
        data = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        return ModelConfig.model_validate(data["model"]), data
    except FileNotFoundError:
        raise InputError(f"{folder}: no {CONFIG}; not a model folder") from None
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"{folder / CONFIG}: not a model of this project: {e}") from None


class Files:
    """The tensors of a model folder by name, read one at a time."""

    def __init__(self, folder: Path):
        self.folder = folder
        if (folder / INDEX).is_file():
            weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
            files = sorted(set(weight_map.values()))
        elif (folder / SINGLE).is_file():
            files = [SINGLE]
        else:
            raise InputError(f"{folder}: neither {SINGLE} nor {INDEX}; not a model folder")
        self._lazy: dict[str, mx.array] = {}
        for file in files:
            if Path(file).name != file or not (folder / file).is_file():
                raise InputError(f"{folder / INDEX}: shard {file!r} is not there")
            self._lazy |= load_file(folder / file)

    def take(self, name: str, shape: tuple[int, ...] | None = None) -> mx.array:
        """The tensor `name`, evaluated (mx.load alone is lazy) and no longer held here."""
        if name not in self._lazy:
            raise InputError(f"{self.folder}: tensor {name} is missing")
        value = self._lazy.pop(name)
        if shape is not None and tuple(value.shape) != shape:
            raise InputError(f"{self.folder}: tensor {name} has shape {tuple(value.shape)}, the config says {shape}")
        mx.eval(value)
        return value

    def __contains__(self, name: str) -> bool:
        return name in self._lazy

    def __call__(self, spec: ParamSpec) -> Weight:
        """The weight of `spec`, dense or NF4: a model's `Source`."""
        if f"{spec.name}.codes" not in self:
            return self.take(spec.name, spec.shape)
        parts = {part: self.take(f"{spec.name}.{part}") for part in NF4Tensor.PARTS}
        if len(spec.shape) == 2:
            return NF4Tensor.from_arrays(spec.shape, parts)
        experts, rows, columns = spec.shape
        return NF4Stack.from_arrays((experts, rows, columns), parts)


def quantized_tensors(name: str, pieces: list[NF4Tensor], stacked: bool) -> Iterator[tuple[str, mx.array]]:
    """The stored tensors of a quantised matrix, or of an expert stack given expert by expert."""
    for part in NF4Tensor.PARTS:
        arrays = [piece.arrays()[part] for piece in pieces]
        yield f"{name}.{part}", mx.stack(arrays) if stacked else arrays[0]


def base_source(folder: Path) -> tuple[ModelConfig, Source]:
    """The shape and the weights of a base folder."""
    config, _ = read_config(folder)
    return config, Files(folder)


def load_model(folder: str | Path, compute: str = "auto") -> MagellanoLM:
    """A model from a folder: a base (dense or NF4), or a release, whose adapter goes on the base it names."""
    folder = Path(folder)
    dtype = compute_dtype(compute)
    if (folder / lora.CONFIG).is_file():
        base = json.loads((folder / lora.CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
        return load_release(folder, (folder / base).resolve(), compute)
    config, source = base_source(folder)
    model = MagellanoLM(config, source, dtype)
    model.freeze()
    return model


def load_release(folder: Path, base: Path, compute: str = "auto") -> MagellanoLM:
    """The base with the release's adapter on it."""
    if not base.is_dir():
        raise InputError(f"{folder}: its base {base} is not there; run the quantize stage again")
    model = load_model(base, compute)
    lora.attach(model, *lora.load(folder, model.config))
    return model


def dense_tensors(model: MagellanoLM) -> Iterator[tuple[str, mx.array]]:
    """Every parameter of a dense model by name, in forward order."""
    flat = dict(tree_flatten(model.parameters()))
    for spec in parameters(model.config):
        yield spec.name, flat[spec.name]
