"""The weights of a model with its adapters in them: W + s B A, dense, one tensor at a time.

Shapes: O out, I in, r rank, E experts.
"""

from collections.abc import Iterator

from magellano import lora
from magellano.backend import mx, tree_flatten
from magellano.layout import ParamSpec, parameters
from magellano.linear import Adapted
from magellano.model import MagellanoLM
from magellano.nf4 import NF4Stack, NF4Tensor

KEPT = {"A_log", "D", "bias"}  # the recurrence's own: small, and what a model forgets by; float32 in every file


def weight(module: Adapted) -> mx.array:
    """What the projection multiplies by, float32, [.., O, I]."""
    w = base(module)
    if module.adapted:
        b, a = module.lora_b.astype(mx.float32), module.lora_a.astype(mx.float32)
        w = w + module.lora_scale * (b @ a)
    return w


def base(module: Adapted) -> mx.array:
    """The same without the adapter."""
    held = module.base
    if isinstance(held, NF4Stack):
        return mx.stack([tensor.dequantize(mx.float32) for tensor in held.tensors])
    return held.dequantize(mx.float32) if isinstance(held, NF4Tensor) else held.astype(mx.float32)


def tensors(model: MagellanoLM, dtype: mx.Dtype) -> Iterator[tuple[str, mx.array]]:
    """Every parameter by name in forward order, matrices, convolutions and norms in `dtype`; A_log, D, biases and the
    router in float32.
    """
    flat = dict(tree_flatten(model.parameters()))
    for spec in parameters(model.config):
        value = flat[spec.name] if spec.target is None else weight(lora.find(model, lora.module_path(spec)))
        yield spec.name, value.astype(mx.float32 if _kept(spec) else dtype)
        mx.clear_cache()


def _kept(spec: ParamSpec) -> bool:
    return spec.name.rsplit(".", 1)[-1] in KEPT or spec.name.endswith("router.weight")
