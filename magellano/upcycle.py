"""Sparse upcycling (Komatsuzaki et al. 2022, arXiv 2212.05055): a trained model goes on with more parameters, at first
the same function.

1. A dense Mamba gets a feed-forward behind every few layers, whose second matrix is zero: the logits do not change.
2. Once that feed-forward is trained, its copies become experts behind a router of noise: gates sum to 1, so the logits
   do not change either; training lets the experts drift apart.
Step 1 makes several experts at once too, with a first matrix of noise each, where nothing is trained in between.

Shapes: E experts, F d_ff, D d_model.
"""

from collections.abc import Callable, Iterator

from magellano import init
from magellano.backend import mx
from magellano.errors import InputError
from magellano.foreign import is_dense
from magellano.layout import ParamSpec, parameters
from magellano.names import LayerKind
from magellano.profile import ModelConfig

Take = Callable[[ParamSpec], mx.array]  # a tensor of the model that is upcycled


def check(old: ModelConfig, new: ModelConfig) -> None:
    """InputError unless `new` can start from `old`."""
    same = {"d_model", "d_state", "d_conv", "expand", "dt_rank", "vocab_size", "norm_eps", "dt_norm_eps", "tied"}
    same |= {"hidden", "gate", "final_norm"}
    for key in sorted(same):
        if getattr(old, key) != getattr(new, key):
            raise InputError(
                f"upcycling: {key} is {getattr(old, key)} there and {getattr(new, key)} here; it must stay"
            )
    if is_dense(old):
        have, want = old.n_layers, _mambas(new)
        if want > have:
            raise InputError(
                f"upcycling: {new.n_layers} layers need {want} Mamba layers, the model has {have}; lower layers"
            )
        if is_dense(new):
            raise InputError("upcycling: the new shape has no experts; set moe_every to at most its layers")
    elif (old.n_layers, old.moe_every, old.d_ff) != (new.n_layers, new.moe_every, new.d_ff):
        raise InputError("upcycling: a model with feed-forwards keeps n_layers, moe_every and d_ff")
    elif old.n_experts != 1:
        raise InputError(f"upcycling: the model has {old.n_experts} experts already; it must have one")


def tensors(old: ModelConfig, new: ModelConfig, take: Take, seed: int) -> Iterator[tuple[str, mx.array]]:
    """The parameters of `new` in forward order, those of `old` by `take`. Where a dense model has more Mamba layers
    than the new shape, the first and the last and evenly spread ones between stay.
    """
    specs = {spec.name: spec for spec in parameters(old)}
    source = _sources(old, new)
    for spec in parameters(new):
        name = _renamed(spec.name, source)
        if name in specs and specs[name].shape == spec.shape:
            value = take(specs[name])
        elif name in specs and ".experts." in name:  # a trained feed-forward, once for each expert
            value = mx.repeat(take(specs[name]), new.n_experts, axis=0)
        elif ".experts.w2." in name:
            value = mx.zeros(spec.shape)
        else:
            value = init.initial(spec, seed)
        yield spec.name, value


def _mambas(config: ModelConfig) -> int:
    return sum(config.kind(layer) is LayerKind.MAMBA for layer in range(config.n_layers))


def _sources(old: ModelConfig, new: ModelConfig) -> dict[int, int]:
    """The old layer of each new one that has one."""
    if not is_dense(old):
        return {layer: layer for layer in range(new.n_layers)}
    want, have = _mambas(new), old.n_layers
    places = [round(n * (have - 1) / max(1, want - 1)) for n in range(want)]
    mambas = [layer for layer in range(new.n_layers) if new.kind(layer) is LayerKind.MAMBA]
    return dict(zip(mambas, places, strict=True))


def _renamed(name: str, source: dict[int, int]) -> str:
    """The old model's name of a new parameter; none of its names for one that is new."""
    parts = name.split(".")
    if parts[:2] != ["backbone", "layers"]:
        return name
    layer = int(parts[2])
    return ".".join([*parts[:2], str(source[layer]), *parts[3:]]) if layer in source else f"new.{name}"
