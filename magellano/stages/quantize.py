"""quantize: a base folder, or seeded initial weights -> an NF4 base, streamed tensor by tensor."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from magellano import init, loader, nf4, pipeline
from magellano.backend import mx
from magellano.errors import InputError
from magellano.layout import ParamSpec, parameters
from magellano.names import LoraTarget
from magellano.nf4 import NF4Tensor
from magellano.profile import Profile
from magellano.progress import Progress


def run(out: Path, profile: Profile, base: Path | None, progress: Progress) -> dict[str, Any]:
    """Write the NF4 base of `profile`; `base` is a dense model folder, or None for the initial weights of base.seed.

    Holds one shard and one expert at a time. InputError where the base has another shape than the profile.
    """
    files = None
    if base is not None:
        config, _ = loader.read_config(base)
        if config != profile.model:
            raise InputError(f"{base}: its shape is not the profile's [model]; {_difference(config, profile.model)}")
        files = loader.Files(base)
    facts: dict[str, Any] = {"parameters": 0, "quantized": 0, "bytes": 0}
    mx.reset_peak_memory()
    tensors = _stream(profile, files, progress, facts)
    loader.write_model(out, profile.model, tensors, quantized=True)
    pipeline.tokenizer(profile).save(out)
    facts["peak_gib"] = round(mx.get_peak_memory() / (1 << 30), 3)
    return facts


def _stream(
    profile: Profile, files: loader.Files | None, progress: Progress, facts: dict[str, Any]
) -> Iterator[tuple[str, mx.array]]:
    specs = parameters(profile.model)
    for done, spec in enumerate(specs):
        facts["parameters"] += spec.size
        if _quantizes(profile, spec):
            facts["quantized"] += spec.size
            pairs = loader.quantized_tensors(
                spec.name, list(_pieces(spec, profile, files)), stacked=len(spec.shape) == 3
            )
        else:
            pairs = iter(
                [(spec.name, files.take(spec.name, spec.shape) if files else init.initial(spec, profile.base.seed))]
            )
        for name, value in pairs:
            facts["bytes"] += value.nbytes
            yield name, value
        progress(done + 1, len(specs), gigabytes=facts["bytes"] / 1e9)


def _pieces(spec: ParamSpec, profile: Profile, files: loader.Files | None) -> Iterator[NF4Tensor]:
    """The matrices of `spec`, quantised: one, or one per expert."""
    for weight in dense(spec, profile, files):
        yield nf4.quantize(weight)
        del weight
        mx.clear_cache()  # without it MLX keeps the float32 temporaries of every expert


def dense(spec: ParamSpec, profile: Profile, files: loader.Files | None) -> Iterator[mx.array]:
    """The matrices of `spec` as they are before: one, or one per expert; from `files`, or of base.seed."""
    stack = files.take(spec.name, spec.shape) if files else None
    if len(spec.shape) == 2:
        yield init.initial(spec, profile.base.seed) if stack is None else stack
        return
    for e in range(spec.shape[0]):
        yield init.initial_expert(spec, profile.base.seed, e) if stack is None else stack[e]


def _quantizes(profile: Profile, spec: ParamSpec) -> bool:
    return spec.target is not None and (spec.target is not LoraTarget.HEAD or profile.quantize.embedding)


def _difference(a: Any, b: Any) -> str:
    mine, theirs = a.model_dump(), b.model_dump()
    return ", ".join(f"{k} {mine[k]} there, {theirs[k]} here" for k in mine if mine[k] != theirs[k])
