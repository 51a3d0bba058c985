"""One AdamW step of one tensor (Loshchilov & Hutter 2019, arXiv 1711.05101; AMSGrad: Reddi et al. 2018, 1904.09237).

    m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2;   w = (1 - lr wd) w - lr (m c1) / (sqrt(v) c2 + eps)
    c1 = 1 / (1 - b1^t);     c2 = 1 / sqrt(1 - b2^t);   AMSGrad puts the largest v so far under the root

The second state is kept as its root s = sqrt(v), in float32 too: one meaning for both formats. In float16 a plain v
underflows (0.001 * g^2 for g = 1e-3 is 1e-9), the step becomes lr m / eps and the weights explode. So 16-bit states
hold 2^10 m, rounded to nearest, and 2^10 sqrt(v), rounded stochastically: its decay of 0.05 % a step is half a unit in
the last place, and to nearest it would stall. The rounding's random numbers are a hash of (key, index), so a resumed
run repeats them. States beyond float16 (gradients over 64) saturate.
"""

import math
from dataclasses import dataclass

from magellano.backend import mx
from magellano.ops.host import KERNELS, Template
from magellano.ops.launch import Kernel, gpu_geometry
from magellano.ops.lazy import plain

SCALE = 1024.0  # of 16-bit states
_LARGEST = 65504.0  # in float16
_SMALLEST_ULP = 2.0**-24  # float16's subnormal spacing
_THREADS = 256  # of a threadgroup on a GPU
_HOST_ELEMENTS = 16384  # of one host thread at a time

_INPUTS, _OUTPUTS = ("w", "g", "m", "s", "peak", "numbers", "key"), ("new_w", "new_m", "new_s", "new_peak")
_HEADER = (KERNELS / "adamw.h").read_text(encoding="utf-8")
_V2, _SIMD8, _FP32 = (
    Kernel(name, _INPUTS, _OUTPUTS, header=_HEADER) for name in ("adamw_fp16_v2", "adamw_fp16_simd8", "adamw_fp32")
)


@dataclass(frozen=True)
class Moments:
    """A tensor's states: m and s = sqrt(v), float32, or float16 holding 2^10 times them; peak: AMSGrad's largest s."""

    m: mx.array
    s: mx.array
    peak: mx.array | None = None


@dataclass(frozen=True)
class Step:
    """The numbers of one step, float32 [8]: lr, 1 - beta1, 1 - beta2, eps, lr * weight decay, c1, c2, the factor on the
    gradient (1 / loss scale, times a clip factor). `key`: uint32 [1], for the stochastic rounding.
    """

    numbers: mx.array
    key: mx.array


def numbers(
    step: mx.array,
    lr: float | mx.array,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    factor: float | mx.array = 1.0,
) -> mx.array:
    """`Step.numbers` of step `step` (from 1). The corrections by expm1: 1 - b^t in float32 loses digits early on."""
    t = step.astype(mx.float32)
    c1 = -1.0 / mx.expm1(t * math.log(beta1)) if beta1 else 1.0
    c2 = mx.rsqrt(-mx.expm1(t * math.log(beta2))) if beta2 else 1.0
    values = (lr, 1.0 - beta1, 1.0 - beta2, eps, lr * weight_decay, c1, c2, factor)
    return mx.stack([mx.array(v, dtype=mx.float32) for v in values])


def hash_u32(x: mx.array) -> mx.array:
    """A mixing of uint32 values (Chris Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * mx.array(0x7FEB352D, dtype=mx.uint32)
    x = (x ^ (x >> 15)) * mx.array(0x846CA68B, dtype=mx.uint32)
    return x ^ (x >> 16)


def adamw(w: mx.array, g: mx.array, moments: Moments, step: Step) -> tuple[mx.array, Moments]:
    """The new w, in w's dtype, and the new moments, in theirs; inside all float32. g: the gradient, any float dtype."""
    assert w.shape == g.shape == moments.m.shape == moments.s.shape, (w.shape, g.shape, moments.m.shape)
    if w.size and not plain(w, g, moments.m, moments.s, step.numbers, step.key):
        return _kernel(w, g, moments, step)
    return reference(w, g, moments, step)


def reference(w: mx.array, g: mx.array, moments: Moments, step: Step) -> tuple[mx.array, Moments]:
    """The definition in MLX operations."""
    lr, a, b, eps, decay, c1, c2, factor = step.numbers
    half = moments.m.dtype == mx.float16
    unscale = 1.0 / SCALE if half else 1.0
    g = g.astype(mx.float32) * factor
    m, s = moments.m.astype(mx.float32) * unscale, moments.s.astype(mx.float32) * unscale
    m = m + a * (g - m)
    s = mx.sqrt(s * s + b * (g * g - s * s))
    peak = None if moments.peak is None else mx.maximum(moments.peak.astype(mx.float32) * unscale, s)
    under = s if peak is None else peak
    new_w = w.astype(mx.float32) * (1.0 - decay) - lr * (m * c1) / (under * c2 + eps)
    if half:
        m = mx.clip(m * SCALE, -_LARGEST, _LARGEST).astype(mx.float16)
        s = _round_stochastically(s * SCALE, step.key)
        peak = None if peak is None else _round_stochastically(peak * SCALE, step.key)
    return new_w.astype(w.dtype), Moments(m, s, peak)


def _round_stochastically(x: mx.array, key: mx.array) -> mx.array:
    """x >= 0 to one of its two float16 neighbours, so that the mean is x."""
    index = mx.arange(x.size, dtype=mx.uint32).reshape(x.shape)
    uniform = (hash_u32(index * mx.array(0x9E3779B1, dtype=mx.uint32) + key) >> 8).astype(mx.float32) * 2.0**-24
    power = (x.view(mx.uint32) & 0x7F800000).view(mx.float32)
    ulp = mx.maximum(power * 2.0**-10, _SMALLEST_ULP)
    return mx.minimum(mx.floor(x / ulp + uniform) * ulp, _LARGEST).astype(mx.float16)


def _kernel(w: mx.array, g: mx.array, moments: Moments, step: Step) -> tuple[mx.array, Moments]:
    amsgrad, half = moments.peak is not None, moments.m.dtype == mx.float16
    per_thread, stride = (8, _THREADS) if gpu_geometry() else (_HOST_ELEMENTS, 1)
    even = half and w.size % (per_thread * stride) == 0
    kernel = _SIMD8 if even else _V2 if half else _FP32
    threads = w.size // per_thread if even else -(-w.size // _THREADS) * _THREADS
    template: Template = {"TW": w.dtype, "TS": moments.m.dtype, "AMSGRAD": amsgrad, "EPT": per_thread if even else 1}
    if even:
        template = {**template, "STRIDE": stride}
    nothing = mx.zeros((8,), moments.m.dtype)
    arrays = (w, g, moments.m, moments.s, nothing if moments.peak is None else moments.peak)
    new_w, m, s, peak = kernel(
        [*(a.reshape(-1) for a in arrays), step.numbers, step.key],
        template=template,
        grid=(threads, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        host_template={"EPT": _HOST_ELEMENTS},
        host_grid=(-(-w.size // _HOST_ELEMENTS), 1, 1),
        output_shapes=[(w.size,)] * 3 + [(w.size,) if amsgrad else (8,)],
        output_dtypes=[w.dtype, *[moments.m.dtype] * 3],
    )
    kept = Moments(m.reshape(w.shape), s.reshape(w.shape), peak.reshape(w.shape) if amsgrad else None)
    return new_w.reshape(w.shape), kept
