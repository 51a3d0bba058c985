"""Model folders in Hugging Face's habit: config.json, model.safetensors or shards with an index; dense or NF4.

A quantised matrix NAME is stored as NAME.codes, NAME.scale_codes, NAME.scale_absmax, NAME.scale_offset; an expert
stack has each part stacked along the first axis.
"""

import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from magellano import files, lora
from magellano.backend import compute_dtype, mx, tree_flatten
from magellano.errors import InputError
from magellano.headers import Header
from magellano.layout import ParamSpec, parameters
from magellano.linear import Weight
from magellano.model import MagellanoLM, Source
from magellano.nf4 import NF4Stack, NF4Tensor, stored
from magellano.profile import ModelConfig
from magellano.tensors import load_file

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
SHARD_BYTES = 1 << 30  # a shard is closed once it is larger
INDEX_BYTES = 16 << 20
Shapes = Mapping[str, tuple[int, ...]]
FLOATS = ("F32", "F16", "BF16")
REMEDY = "give the folder of a model that was made here, or make it again"
# What a config.json may ask for at most, so that a hostile one costs neither memory nor time: far above any profile.
LARGEST = {
    "n_layers": 4096, "n_experts": 4096, "d_model": 1 << 17, "d_ff": 1 << 19, "d_state": 1 << 12, "d_conv": 1 << 10,
    "expand": 1 << 6, "dt_rank": 1 << 17,
}  # fmt: skip


def write_model(folder: Path, config: ModelConfig, tensors: Iterable[tuple[str, mx.array]], quantized: bool) -> None:
    """Stream (name, tensor) pairs into a model folder: shards, index and config.json."""
    write_tensors(folder, tensors)
    description = {
        "architectures": ["MagellanoLM"],
        "model_type": "magellano",
        "model": config.model_dump(mode="json"),
        "quantization": "nf4" if quantized else None,
    }
    (folder / CONFIG).write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def write_tensors(folder: Path, tensors: Iterable[tuple[str, mx.array]]) -> int:
    """Stream (name, tensor) pairs into safetensors shards; at most one shard is held. Then the index. Returns the bytes
    of all tensors.
    """
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
    return total


def read_config(folder: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """The model's shape and the whole config.json. InputError where the folder is no model of ours."""
    path = folder / CONFIG
    if not os.path.lexists(path):
        raise InputError(f"{folder}: no {CONFIG}; not a model folder; {REMEDY}")
    try:
        data = files.read_json(path, f"not a model of this project; {REMEDY}")
        config = ModelConfig.model_validate(data["model"])
        check_sizes(config)
    except InputError:
        raise
    except (KeyError, TypeError, ValueError) as e:
        raise InputError(f"{path}: not a model of this project: {files.told(e)}; {REMEDY}") from None
    return config, data


def check_sizes(config: ModelConfig) -> None:
    """ValueError where a foreign config asks for more than any model needs."""
    for key, most in LARGEST.items():
        if getattr(config, key) > most:
            raise ValueError(f"model.{key}: {files.shown(getattr(config, key))} is more than {most:,}")


class Files:
    """The tensors of a model folder by name, read one at a time.

    Names, shapes and types are compared with config.json before MLX sees a file, and the tensors' bytes are read when
    they are taken. InputError where a file is no plain file of the folder, lacks a tensor or holds another.
    """

    def __init__(
        self,
        folder: Path,
        config: ModelConfig | None = None,
        more: Mapping[str, tuple[int, ...]] | None = None,
        turned: Mapping[str, tuple[int, ...]] | None = None,
    ):
        """`config` where config.json is not ours; `more`: tensors by shape that may be there besides; `turned`: shapes
        that are taken too.
        """
        self.folder = folder
        specs = parameters(config or read_config(folder)[0])
        self._allowed = _allowed(specs) | {name: (shape, FLOATS) for name, shape in (more or {}).items()}
        self._turned = turned or {}
        self._lazy: dict[str, mx.array] = {}
        for file, named in self._shards().items():
            self._lazy |= load_file(folder / file, functools.partial(self._check, file, named))
        for spec in specs:
            parts = [f"{spec.name}.{part}" for part in NF4Tensor.PARTS]
            there = [name for name in (spec.name, *parts) if name in self]
            if not there:
                raise InputError(f"{folder}: tensor {spec.name} is missing; {REMEDY}")
            if there not in ([spec.name], parts):
                raise InputError(f"{folder}: tensor {spec.name} is neither whole in NF4 nor dense: {there}; {REMEDY}")

    def _shards(self) -> dict[str, set[str] | None]:
        """The safetensors files and the tensors that the index says are in each; None: all of them."""
        path = self.folder / INDEX
        if os.path.lexists(path):
            weight_map = files.read_json(path, REMEDY, INDEX_BYTES).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise InputError(f"{path}: weight_map: not a table from tensors to files; {REMEDY}")
            shards: dict[str, set[str] | None] = {}
            for name, file in weight_map.items():
                if not isinstance(file, str) or not _plain_name(file):
                    raise InputError(
                        f"{path}: weight_map: tensor {files.shown(name)} is to be in {files.shown(file)}, "
                        f"which is no file's name in this folder; {REMEDY}"
                    )
                if not os.path.lexists(self.folder / file):
                    raise InputError(f"{path}: shard {files.shown(file)} is not there; {REMEDY}")
                named = shards.setdefault(file, set())
                assert named is not None
                named.add(name)
            return dict(sorted(shards.items()))
        if os.path.lexists(self.folder / SINGLE):
            return {SINGLE: None}
        raise InputError(f"{self.folder}: neither {SINGLE} nor {INDEX}; not a model folder; {REMEDY}")

    def _check(self, file: str, named: set[str] | None, header: Header) -> None:
        path = self.folder / file
        if named is not None and (wrong := sorted(named ^ set(header))):
            where = "in it, but not in the index" if wrong[0] in header else "said to be in it by the index, but is not"
            raise InputError(f"{path}: tensor {files.shown(wrong[0])} is {where}; {REMEDY}")
        for name, entry in header.items():
            if name not in self._allowed:
                raise InputError(f"{path}: tensor {name} belongs to no parameter of {CONFIG}'s model; {REMEDY}")
            shape, dtypes = self._allowed[name]
            if entry.shape not in (shape, self._turned.get(name)):
                raise InputError(f"{path}: tensor {name} has shape {entry.shape}, the config says {shape}; {REMEDY}")
            if entry.dtype not in dtypes:
                raise InputError(f"{path}: tensor {name} is {entry.dtype}; save it as {' or '.join(dtypes)}")

    def take(self, name: str, shape: tuple[int, ...] | None = None) -> mx.array:
        """The tensor `name`, evaluated (mx.load alone is lazy) and no longer held here."""
        if name not in self._lazy:
            raise InputError(f"{self.folder}: tensor {name} is missing; {REMEDY}")
        value = self._lazy.pop(name)
        if shape is not None and tuple(value.shape) != shape:
            found = tuple(value.shape)
            raise InputError(f"{self.folder}: tensor {name} has shape {found}, the config says {shape}; {REMEDY}")
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
    if os.path.lexists(folder / lora.CONFIG):
        return load_release(folder, lora.base_of(folder), compute)
    config, source = base_source(folder)
    model = MagellanoLM(config, source, dtype)
    model.freeze()
    return model


def load_release(folder: Path, base: Path, compute: str = "auto") -> MagellanoLM:
    """The base with the release's adapter on it."""
    if not base.is_dir():
        raise InputError(f"{folder}: its base {base} is not there; run the quantize stage again")
    if os.path.lexists(base / lora.CONFIG):
        raise InputError(f"{folder}: its base {base} is an adapter itself; name the quantised base")
    model = load_model(base, compute)
    lora.attach(model, *lora.load(folder, model.config))
    return model


def _plain_name(name: str) -> bool:
    return name not in ("", ".", "..") and name.isprintable() and not {"/", "\\"} & set(name)


def _allowed(specs: list[ParamSpec]) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Every tensor that a folder with these parameters may hold, dense or NF4: its shape and its possible types."""
    found: dict[str, tuple[tuple[int, ...], tuple[str, ...]]] = {}
    for spec in specs:
        found[spec.name] = spec.shape, FLOATS
        if spec.target is not None:
            found |= {f"{spec.name}.{part}": (shape, (dtype,)) for part, (shape, dtype) in stored(spec.shape).items()}
    return found


def dense_tensors(model: MagellanoLM) -> Iterator[tuple[str, mx.array]]:
    """Every parameter of a dense model by name, in forward order."""
    flat = dict(tree_flatten(model.parameters()))
    for spec in parameters(model.config):
        yield spec.name, flat[spec.name]
