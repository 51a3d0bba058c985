"""One AdamW step of one tensor (Loshchilov & Hutter 2019, arXiv 1711.05101; AMSGrad: Reddi et al. 2018, 1904.09237).

    m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2;   w = (1 - lr wd) w - lr (m c1) / (sqrt(v) c2 + eps)
    c1 = 1 / (1 - b1^t);     c2 = 1 / sqrt(1 - b2^t);   AMSGrad puts the largest v so far under the root

The second state is kept as its root s = sqrt(v), in float32 too: one meaning for both formats. In float16 a plain v
underflows (0.001 * g^2 for g = 1e-3 is 1e-9), the step becomes lr m / eps and the weights explode. So 16-bit states
hold 2^10 m, rounded to nearest, and 2^10 sqrt(v), rounded stochastically: its decay of 0.05 % a step is half a unit in
the last place, and to nearest it would stall. An element's random number is a hash of (salt, index) plus the step times
the golden ratio, modulo 1: repeated by a resumed run, and over the steps spread more evenly than independent numbers,
which halves the error. States beyond float16 (gradients over 64) saturate.
"""

import functools
import math
from dataclasses import dataclass

import numpy as np

from magellano.backend import mx
from magellano.ops.host import KERNELS, Template
from magellano.ops.launch import Kernel, gpu_geometry
from magellano.ops.lazy import plain

SCALE = 1024.0  # of 16-bit states
_LARGEST = 65504.0  # in float16
_SMALLEST_ULP = 2.0**-24  # float16's subnormal spacing
_THREADS = 256  # of a threadgroup on a GPU
_HOST_ELEMENTS = 16384  # of one host thread at a time
_UINT32, _GOLDEN = 0xFFFFFFFF, 0x9E3779B1  # 2^32 times the golden ratio less 1, odd

_INPUTS, _OUTPUTS = ("w", "g", "m", "s", "peak", "numbers"), ("new_w", "new_m", "new_s", "new_peak")
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
    """The numbers of one step, from 1: learning rate, betas, eps, weight decay, and the factor on the gradient (1 over
    the loss scale, times a clip factor). `salt` tells tensors and seeds apart in the stochastic rounding.
    """

    step: int
    lr: float | mx.array
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    factor: float | mx.array = 1.0
    salt: int = 0

    def numbers(self) -> mx.array:
        """float32 [10], as the kernels take it: lr, 1 - beta1, 1 - beta2, eps, lr * weight decay, c1, c2, factor, and
        the bits of the salt and the phase, which is step times the golden ratio as a fraction of 2^32. One small array,
        for on a GPU every operation costs some 5 microseconds. The corrections by expm1: 1 - b^t loses digits early on.
        """
        c1 = -1.0 / math.expm1(self.step * math.log(self.beta1)) if self.beta1 else 1.0
        c2 = 1.0 / math.sqrt(-math.expm1(self.step * math.log(self.beta2))) if self.beta2 else 1.0
        lr, factor = (1.0 if isinstance(v, mx.array) else v for v in (self.lr, self.factor))
        values = np.array(
            [lr, 1 - self.beta1, 1 - self.beta2, self.eps, lr * self.weight_decay, c1, c2, factor, 0, 0], np.float32
        )
        values[8:].view(np.uint32)[:] = self.salt & _UINT32, self.step * _GOLDEN & _UINT32
        numbers = mx.array(values)
        for given, places in ((self.lr, (0, 4)), (self.factor, (7,))):
            if isinstance(given, mx.array):
                numbers = mx.where(
                    mx.array([i in places for i in range(10)]), numbers * given.astype(mx.float32), numbers
                )
        return numbers


def hash_u32(x: mx.array) -> mx.array:
    """A mixing of uint32 values (Chris Wellons' lowbias32)."""
    x = (x ^ (x >> 16)) * mx.array(0x7FEB352D, dtype=mx.uint32)
    x = (x ^ (x >> 15)) * mx.array(0x846CA68B, dtype=mx.uint32)
    return x ^ (x >> 16)


def adamw(
    w: mx.array, g: mx.array, moments: Moments, step: Step, *, in_place: bool = False
) -> tuple[mx.array, Moments]:
    """The new w, in w's dtype, and the new moments, in theirs; inside all float32. g: the gradient, any float dtype.

    `in_place`: nobody else holds the moments, so that a CPU may write the new ones over them.
    """
    assert w.shape == g.shape == moments.m.shape == moments.s.shape, (w.shape, g.shape, moments.m.shape)
    if w.size and not plain(w, g, moments.m, moments.s):
        return _kernel(w, g, moments, step, in_place)
    return reference(w, g, moments, step)


def reference(w: mx.array, g: mx.array, moments: Moments, step: Step) -> tuple[mx.array, Moments]:
    """The definition in MLX operations."""
    numbers = step.numbers()
    lr, a, b, eps, decay, c1, c2, factor = numbers[:8]
    salt, phase = numbers[8:].view(mx.uint32)
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
        s = _round_stochastically(s * SCALE, salt, phase)
        peak = None if peak is None else _round_stochastically(peak * SCALE, salt, phase)
    return new_w.astype(w.dtype), Moments(m, s, peak)


def _round_stochastically(x: mx.array, salt: mx.array, phase: mx.array) -> mx.array:
    """x >= 0 to one of its two float16 neighbours, so that the mean is x."""
    index = mx.arange(x.size, dtype=mx.uint32).reshape(x.shape)
    random = hash_u32(index * mx.array(_GOLDEN, dtype=mx.uint32) + salt) + phase
    uniform = (random >> 8).astype(mx.float32) * 2.0**-24
    power = (x.view(mx.uint32) & 0x7F800000).view(mx.float32)
    ulp = mx.maximum(power * 2.0**-10, _SMALLEST_ULP)
    return mx.minimum(mx.floor(x / ulp + uniform) * ulp, _LARGEST).astype(mx.float16)


@functools.cache
def _no_peak(dtype: mx.Dtype) -> mx.array:
    return mx.zeros((8,), dtype)


def _kernel(w: mx.array, g: mx.array, moments: Moments, step: Step, in_place: bool) -> tuple[mx.array, Moments]:
    shape, amsgrad, half = w.shape, moments.peak is not None, moments.m.dtype == mx.float16
    eights = half and gpu_geometry() and w.size % (8 * _THREADS) == 0
    kernel = _SIMD8 if eights else _V2 if half else _FP32
    threads = w.size // 8 if eights else -(-w.size // _THREADS) * _THREADS
    template: Template = {"TW": w.dtype, "TS": moments.m.dtype, "AMSGRAD": amsgrad}
    template = {**template, **({"TG": g.dtype} if eights else {"EPT": 1})}
    states = {"new_m": moments.m, "new_s": moments.s}
    if moments.peak is not None:
        states["new_peak"] = moments.peak
    peak = _no_peak(moments.m.dtype) if moments.peak is None else moments.peak
    new_w, m, s, new_peak = kernel(
        [*(_flat(a) for a in (w, g, moments.m, moments.s, peak)), step.numbers()],
        template=template,
        grid=(threads, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        host_template={"EPT": _HOST_ELEMENTS},
        host_grid=(-(-w.size // _HOST_ELEMENTS), 1, 1),
        output_shapes=[(w.size,)] * 3 + [(w.size,) if amsgrad else (8,)],
        output_dtypes=[w.dtype, *[moments.m.dtype] * 3],
        reuse={name: _flat(a) for name, a in states.items()} if in_place else None,
    )
    if len(shape) != 1:
        new_w, m, s, new_peak = (
            new_w.reshape(shape),
            m.reshape(shape),
            s.reshape(shape),
            new_peak.reshape(shape if amsgrad else 8),
        )
    return new_w, Moments(m, s, new_peak if amsgrad else None)


def _flat(a: mx.array) -> mx.array:
    return a if a.ndim == 1 else a.reshape(-1)
