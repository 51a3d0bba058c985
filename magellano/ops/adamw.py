"""One AdamW step of one tensor (Loshchilov & Hutter 2019, arXiv 1711.05101; AMSGrad: Reddi et al. 2018, arXiv
1904.09237).

    m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2;   w = (1 - lr wd) w - lr (m c1) / (sqrt(v) c2 + eps)
    c1 = 1 / (1 - b1^t);     c2 = 1 / sqrt(1 - b2^t);   AMSGrad puts the largest v so far under the root

The second state is kept as its root s = sqrt(v), in float32 too: one meaning for both formats. In float16 a plain v
underflows (0.001 * g^2 for g = 1e-3 is 1e-9), the step becomes lr m / eps and the weights explode. So 16-bit states
hold 2^10 m, rounded to nearest, and 2^10 sqrt(v), rounded stochastically: its decay of 0.05 % a step is half a unit in
the last place, and to nearest it would stall. The rounding's random numbers are a hash of (key, index), so a resumed
run repeats them.
"""

import math
from dataclasses import dataclass

from magellano.backend import mx

SCALE = 1024.0  # of 16-bit states
_LARGEST = 65504.0  # in float16
_SMALLEST_ULP = 2.0**-24  # float16's subnormal spacing


@dataclass(frozen=True)
class Moments:
    """A tensor's states: m and s = sqrt(v), float32, or float16 holding 2^10 times them; peak: AMSGrad's largest s."""

    m: mx.array
    s: mx.array
    peak: mx.array | None = None


@dataclass(frozen=True)
class Step:
    """The numbers of one step. `factor` multiplies the gradient (1 / loss scale, times a clip factor); `c1` and `c2`
    correct the bias. lr, factor, c1 and c2 are float32 scalars, `key` a uint32 scalar.
    """

    lr: mx.array
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    c1: mx.array
    c2: mx.array
    factor: mx.array
    key: mx.array


def corrections(step: mx.array, beta1: float, beta2: float) -> tuple[mx.array, mx.array]:
    """c1 and c2 after `step` steps (from 1). By expm1, since 1 - b^t in float32 loses half its digits at the start."""
    t = step.astype(mx.float32)
    c1 = mx.array(1.0) if beta1 == 0 else -1.0 / mx.expm1(t * math.log(beta1))
    c2 = mx.array(1.0) if beta2 == 0 else mx.rsqrt(-mx.expm1(t * math.log(beta2)))
    return c1, c2


def hash_u32(x: mx.array) -> mx.array:
    """A mixing of uint32 values (Chris Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * mx.array(0x7FEB352D, dtype=mx.uint32)
    x = (x ^ (x >> 15)) * mx.array(0x846CA68B, dtype=mx.uint32)
    return x ^ (x >> 16)


def _round_stochastically(x: mx.array, key: mx.array) -> mx.array:
    """x >= 0 to one of its two float16 neighbours, so that the mean is x."""
    index = mx.arange(x.size, dtype=mx.uint32).reshape(x.shape)
    uniform = (hash_u32(index * mx.array(0x9E3779B1, dtype=mx.uint32) + key) >> 8).astype(mx.float32) * 2.0**-24
    power = (x.view(mx.uint32) & 0x7F800000).view(mx.float32)
    ulp = mx.maximum(power * 2.0**-10, _SMALLEST_ULP)
    return mx.minimum(mx.floor(x / ulp + uniform) * ulp, _LARGEST).astype(mx.float16)


def adamw(w: mx.array, g: mx.array, moments: Moments, p: Step) -> tuple[mx.array, Moments]:
    """The new w, in w's dtype, and the new moments, in theirs. Inside all float32. g: the gradient, any float dtype."""
    half = moments.m.dtype == mx.float16
    inverse = 1.0 / SCALE if half else 1.0
    g = g.astype(mx.float32) * p.factor
    m, s = moments.m.astype(mx.float32) * inverse, moments.s.astype(mx.float32) * inverse
    m = m + (1.0 - p.beta1) * (g - m)
    s = mx.sqrt(p.beta2 * s * s + (1.0 - p.beta2) * g * g)
    peak = None if moments.peak is None else mx.maximum(moments.peak.astype(mx.float32) * inverse, s)
    under = s if peak is None else peak
    w_new = w.astype(mx.float32) * (1.0 - p.lr * p.weight_decay) - p.lr * (m * p.c1) / (under * p.c2 + p.eps)
    if half:
        m = mx.clip(m * SCALE, -_LARGEST, _LARGEST).astype(mx.float16)
        s = _round_stochastically(s * SCALE, p.key)
        peak = None if peak is None else _round_stochastically(peak * SCALE, p.key)
    return w_new.astype(w.dtype), Moments(m, s, peak)
