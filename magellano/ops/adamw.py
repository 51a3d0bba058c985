"""One AdamW step of one tensor (Loshchilov & Hutter 2019, arXiv 1711.05101; AMSGrad: Reddi et al. 2018, 1904.09237).

    m = b1 m + (1 - b1) g;   v = b2 v + (1 - b2) g^2;   w = (1 - lr wd) w - lr (m c1) / (sqrt(v) c2 + eps)
    c1 = 1 / (1 - b1^t);     c2 = 1 / sqrt(1 - b2^t);   AMSGrad puts the largest v so far under the root

The second state is kept as its root s = sqrt(v), in float32 too: one meaning for both formats. In float16 a plain v
underflows (0.001 * g^2 for g = 1e-3 is 1e-9), the step becomes lr m / eps and the weights explode. So 16-bit states
hold 2^10 m, rounded to nearest, and 2^10 sqrt(v), rounded stochastically: its decay of 0.05 % a step is half a unit in
the last place, and to nearest it would stall. An element's random number is a hash of (salt, index) plus the step times
the golden ratio, modulo 1: repeated by a resumed run, and over the steps spread more evenly than independent numbers,
which halves the error. States beyond float16 (gradients over 64) saturate. Where the factor on the gradient is not
finite, nothing changes.

What a step needs beside its tensors lies in three small arrays (`Numbers`), so that a training loop can make them once
for many steps: on CUDA the first read of what the CPU has just written costs 25 to 150 microseconds, more than a step.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from magellano.backend import mx
from magellano.ops.host import KERNELS, Template
from magellano.ops.launch import Kernel, gpu_geometry
from magellano.ops.lazy import plain

SCALE = 1024.0  # of 16-bit states
_LARGEST = 65504.0  # in float16
_SMALLEST_NORMAL = 2.0**-14  # in float16
_THREADS = 256  # of a threadgroup on a GPU
_SEVERAL = 1 << 22  # elements from which a thread takes two packs of 8: fewer would leave a large GPU short of threads
_HOST_ELEMENTS = 16384  # of one host thread at a time
_UINT32, _GOLDEN = 0xFFFFFFFF, 0x9E3779B1  # 2^32 times the golden ratio less 1, odd

_INPUTS = ("w", "g", "m", "s", "peak", "now", "own", "factor")
_OUTPUTS = ("new_w", "new_m", "new_s", "new_peak")
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


class Numbers(NamedTuple):
    """What the kernels read beside the tensors, each float32 [8] at a multiple of 16 bytes; see the makers below.
    now: of the step; own: of the tensor; factor: what the gradient is multiplied by, eight times.
    """

    now: mx.array
    own: mx.array
    factor: mx.array


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

    def numbers(self) -> Numbers:
        """On the device, by a fresh upload: for a single step."""
        own = own_numbers((self.beta1, self.beta2), self.eps, self.weight_decay, self.salt)
        return Numbers(now_of(self.step, self.lr, (self.beta1, self.beta2)), own, factor_numbers(self.factor))


def now_numbers(first: int, rates: Sequence[float], betas: tuple[float, float]) -> list[mx.array]:
    """For each step from `first` (from 1) on, float32 [8]: the learning rate, c1, c2, the bits of the phase, which is
    step times the golden ratio as a fraction of 2^32; the rest is 0. All are views of one upload: taking one costs no
    launch, where table[i] would be a gather. The corrections by expm1: 1 - b^t loses digits early on.
    """
    table = np.zeros((len(rates), 8), np.float32)
    table[:, 0] = rates
    logs = [math.log(beta) if beta else -math.inf for beta in betas]
    for row, t in zip(table, range(first, first + len(rates)), strict=True):
        row[1:3] = -1.0 / math.expm1(t * logs[0]), 1.0 / math.sqrt(-math.expm1(t * logs[1]))
        row[3:4].view(np.uint32)[:] = t * _GOLDEN & _UINT32
    return list(mx.split(_on_device(table.reshape(-1)), len(rates)))


def now_of(step: int, lr: float | mx.array, betas: tuple[float, float]) -> mx.array:
    """`now_numbers` of one step; lr may be an array of one element, which is never waited for."""
    if not isinstance(lr, mx.array):
        return now_numbers(step, [lr], betas)[0]
    return mx.concatenate([lr.astype(mx.float32).reshape(1), now_numbers(step, [0.0], betas)[0][1:]])


def own_numbers(betas: tuple[float, float], eps: float, weight_decay: float, salt: int) -> mx.array:
    """float32 [8]: 1 - beta1, 1 - beta2, eps, weight decay, the bits of the salt, 0, 0, 0."""
    row = np.array([1 - betas[0], 1 - betas[1], eps, weight_decay, 0, 0, 0, 0], np.float32)
    row[4:5].view(np.uint32)[:] = salt & _UINT32
    return _on_device(row)


def factor_numbers(factor: float | mx.array) -> mx.array:
    """float32 [8] of `factor` (an array of this form as it is). The last few floats are remembered, others uploaded."""
    if not isinstance(factor, mx.array):
        return _factor(float(factor))
    if factor.shape == (8,) and factor.dtype == mx.float32:
        return factor
    return mx.contiguous(mx.broadcast_to(factor.astype(mx.float32).reshape(1), (8,)))


@functools.lru_cache(maxsize=16)
def _factor(factor: float) -> mx.array:
    return _on_device(np.full(8, factor, np.float32))


@functools.cache
def _no_peak(dtype: mx.Dtype) -> mx.array:
    return _on_device(np.zeros(4 if dtype == mx.float16 else 8, np.float32)).view(dtype)


def _on_device(values: np.ndarray) -> mx.array:
    """float32 `values` in memory that the device itself has written: it never shares a page with what the CPU writes
    later. As integers, for some numbers are only bits.
    """
    return (mx.array(values.view(np.uint32)) | mx.zeros(values.shape, mx.uint32)).view(mx.float32)


def adamw(
    w: mx.array, g: mx.array, moments: Moments, step: Step | Numbers, *, in_place: bool = False
) -> tuple[mx.array, Moments]:
    """The new w, in w's dtype, and the new moments, in theirs; inside all float32. g: the gradient, any float dtype.

    `in_place`: nobody else holds the moments, so that a CPU may write the new ones over them.
    """
    assert w.shape == g.shape == moments.m.shape == moments.s.shape, (w.shape, g.shape, moments.m.shape)
    numbers = step.numbers() if isinstance(step, Step) else step
    if w.size and not plain(w, g, moments.m, moments.s):
        return _kernel(w, g, moments, numbers, in_place)
    return reference(w, g, moments, numbers)


def reference(w: mx.array, g: mx.array, moments: Moments, step: Step | Numbers) -> tuple[mx.array, Moments]:
    """The definition in MLX operations."""
    now, own, given = step.numbers() if isinstance(step, Step) else step
    (lr, c1, c2), (a, b, eps, weight_decay) = now[:3], own[:4]
    half = moments.m.dtype == mx.float16
    scale = SCALE if half else 1.0
    fresh = g.astype(mx.float32) * (given[0] * scale)
    m, s = moments.m.astype(mx.float32), moments.s.astype(mx.float32)
    m = m + a * (fresh - m)
    s = mx.sqrt(s * s + b * (fresh * fresh - s * s))
    peak = None if moments.peak is None else mx.maximum(moments.peak.astype(mx.float32), s)
    under = s if peak is None else peak
    new_w = w.astype(mx.float32) * (1.0 - lr * weight_decay) - lr * c1 * m / (under * c2 + eps * scale)
    if half:
        random = _random(w.shape, own[4:5].view(mx.uint32), now[3:4].view(mx.uint32))
        m = mx.clip(m, -_LARGEST, _LARGEST)
        s, peak = (None if x is None else _round_half(x, random) for x in (s, peak))  # type: ignore[assignment]

    def unless_skipped(new: mx.array, old: mx.array) -> mx.array:
        return mx.where(mx.isfinite(given[0]), new.astype(old.dtype), old)

    peak = None if moments.peak is None or peak is None else unless_skipped(peak, moments.peak)
    return unless_skipped(new_w, w), Moments(unless_skipped(m, moments.m), unless_skipped(s, moments.s), peak)


def _random(shape: tuple[int, ...], salt: mx.array, phase: mx.array) -> mx.array:
    """uint32 of `shape`: a hash of the element, moved on by the step's phase."""
    x = mx.arange(math.prod(shape), dtype=mx.uint32).reshape(shape) * mx.array(_GOLDEN, dtype=mx.uint32) + salt
    return (x ^ (x >> 15)) * mx.array(0x846CA68B, dtype=mx.uint32) + phase


def _round_half(x: mx.array, random: mx.array) -> mx.array:
    """x >= 0 to one of its two float16 neighbours, so that the mean is x: 13 random bits are added below the mantissa
    that stays, and cut off; below 2^-14, where the spacing is that of [2^-14, 2^-13), after a detour there.
    """
    x = mx.minimum(x, _LARGEST)
    detour = mx.where(x < _SMALLEST_NORMAL, _SMALLEST_NORMAL, 0.0)
    return (((x + detour).view(mx.uint32) + (random >> 19)) & 0xFFFFE000).view(mx.float32) - detour


class _Plan(NamedTuple):
    """How a launch for tensors of one kind looks."""

    kernel: Kernel
    template: Template
    threads: int
    shapes: Sequence[tuple[int, ...]]
    dtypes: Sequence[mx.Dtype]


@functools.lru_cache(maxsize=1024)
def _plan(size: int, weight: mx.Dtype, gradient: mx.Dtype, state: mx.Dtype, amsgrad: bool, gpu: bool) -> _Plan:
    template: Template = {"TW": weight, "TS": state, "AMSGRAD": amsgrad}
    kernel, threads = _V2 if state == mx.float16 else _FP32, -(-size // _THREADS) * _THREADS
    eight = 8 * _THREADS
    if state == mx.float16 and gpu and size % eight == 0:
        packs = 2 if size >= _SEVERAL and size % (2 * eight) == 0 else 1
        kernel, threads, template = _SIMD8, size // (8 * packs), {**template, "TG": gradient, "PACKS": packs}
    else:
        template = {**template, "EPT": 1}
    return _Plan(kernel, template, threads, [(size,)] * 3 + [(size,) if amsgrad else (8,)], [weight, *[state] * 3])


def _kernel(w: mx.array, g: mx.array, moments: Moments, step: Numbers, in_place: bool) -> tuple[mx.array, Moments]:
    old = (moments.m, moments.s) if moments.peak is None else (moments.m, moments.s, moments.peak)
    plan = _plan(w.size, w.dtype, g.dtype, old[0].dtype, len(old) == 3, gpu_geometry())
    flat = [a if a.ndim == 1 else a.reshape(-1) for a in (w, g, *old)]
    peak = [] if len(old) == 3 else [_no_peak(old[0].dtype)]
    made = plan.kernel(
        [*flat, *peak, *step],
        template=plan.template,
        grid=(plan.threads, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        host_template={"EPT": _HOST_ELEMENTS},
        host_grid=(-(-w.size // _HOST_ELEMENTS), 1, 1),
        output_shapes=plan.shapes,
        output_dtypes=plan.dtypes,
        reuse=dict(zip(_OUTPUTS[1:], flat[2:], strict=False)) if in_place else None,
    )
    new_w, *states = (a if w.ndim == 1 else a.reshape(w.shape) for a in made[: 1 + len(old)])
    return new_w, Moments(*states)
