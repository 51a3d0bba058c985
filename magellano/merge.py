"""The weights of a model with its adapters in them: W + s B A, and DoRA's rows of that; dense, one tensor at a time.

Shapes: O out, I in, r rank, E experts.
"""

from collections.abc import Iterator
from typing import Any

from magellano import lora
from magellano.backend import mx, tree_flatten
from magellano.layout import ParamSpec, parameters
from magellano.linear import Adapted, merged
from magellano.model import MagellanoLM
from magellano.nf4 import NF4Stack, NF4Tensor

KEPT = {"A_log", "D", "bias"}  # the recurrence's own: small, and what a model forgets by; float32 in every file


def weight(module: Adapted) -> mx.array:
    """What the projection multiplies by, float32, [.., O, I]."""
    return mx.stack(list(pieces(module))) if len(shape(module)) == 3 else piece(module, 0)


def shape(module: Adapted) -> tuple[int, ...]:
    return tuple(module.base.shape)


def pieces(module: Adapted) -> Iterator[mx.array]:
    """The matrix, or the experts' one by one."""
    return (piece(module, e) for e in range(shape(module)[0] if len(shape(module)) == 3 else 1))


def piece(module: Adapted, expert: int) -> mx.array:
    """W with its adapter, float32 [O, I]; of one expert of a stack."""
    held, stacked = module.base, len(shape(module)) == 3
    matrix = held[expert] if stacked and not isinstance(held, NF4Tensor) else held
    assert not isinstance(matrix, NF4Stack)
    w = matrix.astype(mx.float32) if isinstance(matrix, mx.array) else matrix.dequantize(mx.float32)
    if not module.adapted:
        return w
    m = module.magnitude
    arrays = [module.lora_a, module.lora_b, *([] if m is None else [m])]
    a, b, *rest = (x[expert] if stacked else x for x in arrays)
    return merged(w, a, b, module.lora_scale, *rest)


def at(part: Any, path: str) -> Adapted:
    """The projection at a dotted path below `part`."""
    for step in path.split("."):
        part = part[step]
    return part


def tensors_by_name(model: MagellanoLM) -> Iterator[tuple[str, Any]]:
    """Every parameter by name in forward order: its projection, or the array of one that is none."""
    flat = dict(tree_flatten(model.parameters()))
    for spec in parameters(model.config):
        yield spec.name, flat[spec.name] if spec.target is None else lora.find(model, lora.module_path(spec))


def tensors(model: MagellanoLM, dtype: mx.Dtype) -> Iterator[tuple[str, mx.array]]:
    """Every parameter by name in forward order, matrices, convolutions and norms in `dtype`; A_log, D, biases and the
    router in float32.
    """
    specs = {spec.name: spec for spec in parameters(model.config)}
    for name, held in tensors_by_name(model):
        value = held if specs[name].target is None else weight(held)
        yield name, value.astype(mx.float32 if _kept(specs[name]) else dtype)
        mx.clear_cache()


def _kept(spec: ParamSpec) -> bool:
    return spec.name.rsplit(".", 1)[-1] in KEPT or spec.name.endswith("router.weight")
