"""NF4 with double quantisation (Dettmers et al. 2023, arXiv 2305.14314), bit for bit as bitsandbytes stores it, except
that the 8-bit scale codes are exactly nearest (its CPU path misses the nearest in about 0.2 % of the blocks).

A matrix is flattened and cut into blocks of 64. A block keeps its largest magnitude and 64 codes of 4 bits, two in a
byte, the first in the high nibble; the last block may be short. The maxima, less their mean, are themselves stored in
8 bits, in blocks of 256, on a signed scale whose steps grow with the magnitude (Dettmers et al. 2021, arXiv
2110.02861).

Shapes: n values, C = ceil(n / 2) bytes of codes, P = ceil(n / 64) blocks, Q = ceil(P / 256) blocks of scales; O out, I
in.
"""

import functools
from collections.abc import Iterator
from typing import Protocol

import numpy as np

from magellano.backend import mx
from magellano.ops.launch import Kernel
from magellano.ops.lazy import detached, plain

_QUANTIZE = Kernel("nf4_quantize", ("w", "borders"), ("codes", "absmax"), exact=True)
_DEQUANTIZE = Kernel("nf4_dequantize", ("codes", "factor", "values", "size"), ("out",), exact=True)
_THREADS = 128  # of a threadgroup on a GPU
_GPU_VALUES = 8  # dequantised by one GPU thread
_HOST_BLOCKS = 256  # handled by one host thread at a time

BLOCK, SCALE_BLOCK = 64, 256
_SLICE = 1 << 22  # values quantised at a time: bounds the temporaries
_TINY = 1e-38  # bitsandbytes' guard against an all-zero block

# The 16 quantiles of a normal distribution, from bitsandbytes.
_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Quantized(Protocol):
    """What `nf4_matmul` and the loss need of an NF4 matrix [O, I] (see magellano/nf4.py)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def dequantize(self, dtype: mx.Dtype = ..., after: mx.array | None = None) -> mx.array: ...

    def slices(self, dtype: mx.Dtype) -> Iterator[tuple[int, int, mx.array]]: ...


@functools.cache
def values() -> mx.array:
    """The 16 values of the codes, float32."""
    return mx.array(_VALUES, dtype=mx.float32)


@functools.cache
def _pairs() -> mx.array:
    """The two values of each byte, [256, 2]."""
    table = np.array(_VALUES, np.float32)
    return mx.array(np.stack([np.repeat(table, 16), np.tile(table, 16)], axis=1))


@functools.cache
def midpoints() -> mx.array:
    """The 15 borders between neighbouring codes, float32."""
    table = np.array(_VALUES, np.float32)
    return mx.array((table[:-1] + table[1:]) / np.float32(2))


def _linspace(count: int) -> np.ndarray:
    """torch.linspace(0.1, 1, count) in float32: from both ends, the products not rounded."""
    first, last = np.float32(0.1), np.float32(1)
    step = np.float64((last - first) / np.float32(count - 1))
    i = np.arange(count)
    return np.where(i < count // 2, first + step * i, last - step * (count - 1 - i)).astype(np.float32)


@functools.cache
def _scale_table() -> np.ndarray:
    """The 256 values of an 8-bit scale: bitsandbytes' create_dynamic_map(signed=True), with the same roundings."""
    positive = []
    for power in range(7):
        edges = _linspace(2**power + 1)
        means = (edges[:-1] + edges[1:]) / np.float32(2)
        positive.append(np.float32(10.0 ** (power - 6)) * means)
    half = np.concatenate(positive)
    return np.sort(np.concatenate([half, -half, np.array([0, 1], np.float32)]))


@functools.cache
def scale_values() -> mx.array:
    """The 256 values of an 8-bit scale code, float32."""
    return mx.array(_scale_table())


@functools.cache
def _scale_midpoints() -> mx.array:
    table = _scale_table()
    return mx.array((table[:-1] + table[1:]) * np.float32(0.5))


def quantize_blocks(w_n: mx.array) -> tuple[mx.array, mx.array]:
    """Flat values -> (codes uint8 [C], block maxima float32 [P]). Temporaries are bounded, for tensors of any size."""
    make = _quantize_reference if plain(w_n) else _quantize_kernel
    codes, absmax = [], []
    for i in range(0, w_n.size, _SLICE):
        codes_C, absmax_P = make(w_n[i : i + _SLICE])
        mx.eval(codes_C, absmax_P)
        codes.append(codes_C)
        absmax.append(absmax_P)
    return mx.concatenate(codes), mx.concatenate(absmax)


def _grid(threads: int) -> tuple[int, int, int]:
    return (-(-threads // _THREADS) * _THREADS, 1, 1)


def _quantize_kernel(w_n: mx.array) -> tuple[mx.array, mx.array]:
    blocks = -(-w_n.size // BLOCK)
    codes_C, absmax_P = _QUANTIZE(
        [w_n, midpoints()],
        template={"BLOCKS": 1},
        grid=_grid(blocks),
        threadgroup=(_THREADS, 1, 1),
        host_template={"BLOCKS": _HOST_BLOCKS},
        host_grid=(-(-blocks // _HOST_BLOCKS), 1, 1),
        output_shapes=[(-(-w_n.size // 2),), (blocks,)],
        output_dtypes=[mx.uint8, mx.float32],
    )
    return codes_C, absmax_P


def _quantize_reference(w_n: mx.array) -> tuple[mx.array, mx.array]:
    w_PB = mx.pad(w_n.astype(mx.float32), (0, -w_n.size % BLOCK)).reshape(-1, BLOCK)
    absmax_P = mx.abs(w_PB).max(axis=1)
    scaled_PB = w_PB * (1.0 / mx.maximum(absmax_P, _TINY))[:, None]
    code_PB = mx.zeros(w_PB.shape, dtype=mx.uint8)
    for border in midpoints():
        code_PB = code_PB + (scaled_PB > border)
    codes = (code_PB[:, 0::2] * 16 + code_PB[:, 1::2]).astype(mx.uint8).reshape(-1)
    return codes[: -(-w_n.size // 2)], absmax_P


def quantize_scales(absmax_P: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Block maxima -> (8-bit codes uint8 [P], their blocks' maxima float32 [Q], their mean float32 [1])."""
    offset = mx.array([float(np.array(absmax_P).mean(dtype=np.float64))], dtype=mx.float32)
    centred_QB = mx.pad(absmax_P - offset, (0, -absmax_P.size % SCALE_BLOCK)).reshape(-1, SCALE_BLOCK)
    scale_Q = mx.abs(centred_QB).max(axis=1)
    scaled_QB = centred_QB * mx.where(scale_Q > 0, 1.0 / scale_Q, 0.0)[:, None]
    return _nearest(scaled_QB.reshape(-1)[: absmax_P.size], _scale_midpoints()), scale_Q, offset


def _nearest(x: mx.array, borders: mx.array) -> mx.array:
    """How many of the 255 sorted borders lie below each x, by bisection."""
    code = mx.zeros(x.shape, dtype=mx.int32)
    for step in (128, 64, 32, 16, 8, 4, 2, 1):
        code = mx.where(x > borders[code + (step - 1)], code + step, code)
    return code.astype(mx.uint8)


def expand_scales(scale_codes_P: mx.array, scale_Q: mx.array, offset: mx.array) -> mx.array:
    """The float32 factor of each block, [P]. Product and sum are rounded apart, as in bitsandbytes."""
    count = scale_codes_P.size
    table = scale_values()[mx.pad(scale_codes_P, (0, -count % SCALE_BLOCK)).reshape(-1, SCALE_BLOCK)]
    return (table * scale_Q[:, None]).reshape(-1)[:count] + offset


def dequantize_blocks(codes_C: mx.array, factor_P: mx.array, count: int, dtype: mx.Dtype) -> mx.array:
    """Codes and the factor of each block -> `count` flat values in `dtype`, computed in float32."""
    if plain(codes_C, factor_P):
        return _dequantize_reference(codes_C, factor_P, count, dtype)
    return _DEQUANTIZE(
        [codes_C, factor_P, values(), mx.array([count], dtype=mx.int32)],
        template={"T": dtype, "EPT": _GPU_VALUES},
        grid=_grid(-(-count // _GPU_VALUES)),
        threadgroup=(_THREADS, 1, 1),
        host_template={"EPT": BLOCK * _HOST_BLOCKS},
        host_grid=(-(-count // (BLOCK * _HOST_BLOCKS)), 1, 1),
        output_shapes=[(count,)],
        output_dtypes=[dtype],
    )[0]


def _dequantize_reference(codes_C: mx.array, factor_P: mx.array, count: int, dtype: mx.Dtype) -> mx.array:
    pair_PB = _pairs()[mx.pad(codes_C, (0, -codes_C.size % (BLOCK // 2)))].reshape(-1, BLOCK)
    return (pair_PB * factor_P[:, None]).astype(dtype).reshape(-1)[:count]


def nf4_matmul(x: mx.array, w: Quantized) -> mx.array:
    """x_..I W_OI^T in x's dtype, W frozen: the gradient goes to x alone. W is dequantised again in the backward pass,
    so that its dense form never outlives one product.
    """

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        return detached(x @ w.dequantize(x.dtype, after=x).T)

    @product.vjp
    def product_vjp(x: mx.array, dy: mx.array, _: mx.array) -> mx.array:
        return detached(dy @ w.dequantize(dy.dtype, after=dy))

    y: mx.array = product(x)  # type: ignore[assignment]
    return y
