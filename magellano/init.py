"""Seeded initial weights, one tensor at a time: each depends on (seed, its name) alone, so any part can be made
without the rest.
"""

import hashlib
import math

from magellano.backend import mx
from magellano.layout import Init, ParamSpec

DT_MIN, DT_MAX = 1e-3, 1e-1  # range of softplus(dt_bias) at the start


def key(seed: int, name: str) -> mx.array:
    """A random key for the tensor `name`."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return mx.random.key(int.from_bytes(digest[:8], "little"))


def initial(spec: ParamSpec, seed: int) -> mx.array:
    """Initial values of `spec`, float32 and lazy. Expert stacks [E, out, in] are made expert by expert."""
    if len(spec.shape) == 3 and spec.target is not None:
        return mx.stack([initial_expert(spec, seed, e) for e in range(spec.shape[0])])
    return _draw(spec, spec.shape, key(seed, spec.name))


def initial_expert(spec: ParamSpec, seed: int, expert: int) -> mx.array:
    """Initial values [out, in] of one expert of the stack `spec`."""
    return _draw(spec, spec.shape[1:], key(seed, f"{spec.name}/{expert}"))


def _draw(spec: ParamSpec, shape: tuple[int, ...], k: mx.array) -> mx.array:
    fan_in = shape[-1]
    match spec.init:
        case Init.NORMAL:
            return mx.random.normal(shape, scale=spec.scale / math.sqrt(fan_in), key=k)
        case Init.EMBEDDING:
            return mx.random.normal(shape, scale=0.02, key=k)
        case Init.UNIFORM:
            bound = spec.scale if len(shape) == 1 else spec.scale / math.sqrt(fan_in)
            return mx.random.uniform(-bound, bound, shape, key=k)
        case Init.ONES:
            return mx.ones(shape)
        case Init.ZEROS:
            return mx.zeros(shape)
        case Init.A_LOG:
            return mx.broadcast_to(mx.log(mx.arange(1, shape[1] + 1, dtype=mx.float32)), shape)
        case Init.DT_BIAS:
            dt = mx.exp(mx.random.uniform(math.log(DT_MIN), math.log(DT_MAX), shape, key=k))
            return dt + mx.log(-mx.expm1(-dt))  # the inverse of softplus
