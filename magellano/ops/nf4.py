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
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from magellano.backend import mx
from magellano.ops import around as surroundings
from magellano.ops import launch
from magellano.ops.around import Around
from magellano.ops.host import KERNELS
from magellano.ops.launch import Dialect, Kernel
from magellano.ops.lazy import constant, detached, plain, resident

_QUANTIZE = Kernel("nf4_quantize", ("w", "borders"), ("codes", "absmax"), exact=True)
_HEADER = (KERNELS / "nf4.h").read_text(encoding="utf-8")
_SCALES = ("scale_codes", "scale_absmax", "offset", "scales", "values")
_DEQUANTIZE = Kernel("nf4_dequantize", ("codes", "factor", *_SCALES, "which"), ("out",), exact=True, header=_HEADER)
_MATVEC = Kernel(
    "nf4_matvec",
    ("x", "expert", "codes", *_SCALES, *surroundings.INPUTS),
    ("y",),
    header=_HEADER + surroundings.HEADER,
)
_THREADS, _MATVEC_THREADS, _SIMD = 128, 256, 32  # of a threadgroup and of a simdgroup on a GPU
_GPU_UNITS = 8  # packs of 16 bytes dequantised by one GPU thread
_HOST_BLOCKS = 256  # handled by one host thread at a time
_GPU_AT_ONCE = (2, 1)  # words of a row that a GPU thread has under way, with 128 registers: the first that fits the row
_GPU_OUTS, _HOST_OUTS = 4, 16  # outputs of the matrix-vector product that share the reading of x
GPU_ROWS, HOST_ROWS = 16, 1  # up to so many rows of x it beats a dense product, though it decodes anew for every few
_ROWS_AT_ONCE, _MOST_SPLIT = 4, 8  # on a GPU: rows of x that share the decoding, simdgroups that share a row's columns
_BUSY = 2048  # simdgroups that keep a GPU busy: 16 on each of an H100's processors

BLOCK, SCALE_BLOCK = 64, 256
_SLICE, _GPU_SLICE = 1 << 22, 1 << 28  # values quantised at a time: bounds the temporaries, of which a GPU has none
_TINY = 1e-38  # bitsandbytes' guard against an all-zero block

# The 16 quantiles of a normal distribution, from bitsandbytes.
_VALUES = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Parts:
    """The packed arrays of one matrix, or of E matrices of one shape with a leading dimension E: codes [C], scale_codes
    [P], scale_absmax [Q], offset [1]. Make them by `of`, which fills offset up (see `resident`).
    """

    codes: mx.array
    scale_codes: mx.array
    scale_absmax: mx.array
    offset: mx.array
    _for_rows: dict[int, list[mx.array]] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def of(cls, codes: mx.array, scale_codes: mx.array, scale_absmax: mx.array, offset: mx.array) -> "Parts":
        return cls(codes, scale_codes, scale_absmax, resident(offset.reshape(-1)))

    def for_rows(self, width: int) -> list[mx.array]:
        """Codes with a row for each matrix, in words of `width`, then what `_scale_arrays` gives: views that are made
        once, for each is one more node of the graph of every token.
        """
        if width not in self._for_rows:
            codes = self.codes.reshape(-1, self.codes.shape[-1])
            self._for_rows[width] = [_words(codes, width), *_scale_arrays(self)]
            mx.eval(self._for_rows[width])
        return self._for_rows[width]

    def after(self, a: mx.array | None) -> "Parts":
        """These parts, in a lazy graph not read before `a` is there."""
        return self if a is None else replace(self, codes=mx.depends([self.codes], [a])[0])


class Quantized(Protocol):
    """What the operations need of an NF4 matrix [O, I] (see magellano/nf4.py)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def parts(self) -> Parts: ...

    def dequantize(self, dtype: mx.Dtype = ..., after: mx.array | None = None) -> mx.array: ...

    def slices(self, dtype: mx.Dtype) -> Iterator[tuple[int, int, mx.array]]: ...


@functools.cache
def values() -> mx.array:
    """The 16 values of the codes, float32."""
    return constant(_VALUES, mx.float32)[:16]


@functools.cache
def _no_codes() -> mx.array:
    """Stands in for scale codes that are not used."""
    return constant([0] * 8, mx.uint8)


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
    return constant(_scale_table().tolist(), mx.float32)[:256]


@functools.cache
def _scale_midpoints() -> mx.array:
    table = _scale_table()
    return mx.array((table[:-1] + table[1:]) * np.float32(0.5))


def quantize_blocks(w_n: mx.array) -> tuple[mx.array, mx.array]:
    """Flat values -> (codes uint8 [C], block maxima float32 [P]). Temporaries are bounded, for tensors of any size."""
    make = _quantize_reference if plain(w_n) else _quantize_kernel
    step = _GPU_SLICE if launch.dialect() in (Dialect.CUDA, Dialect.METAL) else _SLICE
    codes, absmax = [], []
    for i in range(0, w_n.size, step):
        codes_C, absmax_P = make(w_n[i : i + step])
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
        grid=_grid(blocks * _SIMD),
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
    return (table * scale_Q[:, None]).reshape(-1)[:count] + offset[:1]


def dequantize(parts: Parts, count: int, dtype: mx.Dtype, which: tuple[int, ...] = ()) -> mx.array:
    """The `count` flat values of one matrix in `dtype`, computed in float32; of E matrices those with the numbers
    `which`, behind each other.
    """
    # Metal's compiler may fuse the factor's product and sum, so there MLX makes the factors.
    if plain(parts.codes) or launch.dialect() is Dialect.METAL:
        if parts.codes.ndim == 1:
            factor_P = expand_scales(parts.scale_codes, parts.scale_absmax, parts.offset)
            return dequantize_blocks(parts.codes, factor_P, count, dtype)
        arrays = (parts.codes, parts.scale_codes, parts.scale_absmax, parts.offset[: parts.codes.shape[0], None])
        return mx.concatenate([dequantize(Parts(*(a[e] for a in arrays)), count, dtype) for e in which])
    return _dequantize_kernel(parts.codes, None, parts, count, dtype, which)


def dequantize_blocks(codes_C: mx.array, factor_P: mx.array, count: int, dtype: mx.Dtype) -> mx.array:
    """Codes and the factor of each block -> `count` flat values in `dtype`, computed in float32."""
    if plain(codes_C, factor_P):
        return _dequantize_reference(codes_C, factor_P, count, dtype)
    return _dequantize_kernel(codes_C, factor_P, None, count, dtype)


def _dequantize_kernel(
    codes: mx.array,
    factor_P: mx.array | None,
    parts: Parts | None,
    count: int,
    dtype: mx.Dtype,
    which: tuple[int, ...] = (),
) -> mx.array:
    width = 16 // dtype.size if launch.gpu_geometry() else 2  # values per word of codes; a GPU stores 16 bytes of them
    assert not which or count % BLOCK == 0, f"{count} values a matrix are no whole blocks"
    words = _words(codes, width).reshape(-1)
    made_words = len(which) * count // width if which else words.size
    made: mx.array = _DEQUANTIZE(
        [words, values() if factor_P is None else factor_P, *_scale_arrays(parts), _numbers((len(which), *which))],
        template={
            "T": dtype, "V": width, "UNITS": _GPU_UNITS, "THREADS": _THREADS, "RUN": 1, "EXPAND": factor_P is None,
            "EACH": count // BLOCK if which else 0,
        },
        grid=_grid(-(-made_words // _GPU_UNITS)),
        threadgroup=(_THREADS, 1, 1),
        host_template={"UNITS": _HOST_BLOCKS, "THREADS": 1, "RUN": BLOCK // width},
        host_grid=(-(-made_words // (BLOCK // width * _HOST_BLOCKS)), 1, 1),
        output_shapes=[(made_words * width,)],
        output_dtypes=[dtype],
    )[0]  # fmt: skip
    wanted = max(1, len(which)) * count
    return made if made.size == wanted else made[:wanted]


@functools.lru_cache(maxsize=4096)
def _numbers(numbers: tuple[int, ...]) -> mx.array:
    """As an array, kept: on a GPU making one is a copy."""
    return constant(numbers or (0,), mx.int32)


def _words(codes: mx.array, width: int) -> mx.array:
    """Codes in words of `width` each, the last filled up."""
    if width == 2:
        return codes
    missing = -codes.shape[-1] % (width // 2)
    if missing:
        codes = mx.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, missing)])
    return codes.view({4: mx.uint16, 8: mx.uint32}[width])


def _scale_arrays(parts: Parts | None) -> list[mx.array]:
    if parts is None:
        return [_no_codes(), *[values()] * 4]
    return [parts.scale_codes.reshape(-1), parts.scale_absmax.reshape(-1), parts.offset, scale_values(), values()]


def _dequantize_reference(codes_C: mx.array, factor_P: mx.array, count: int, dtype: mx.Dtype) -> mx.array:
    pair_PB = _pairs()[mx.pad(codes_C, (0, -codes_C.size % (BLOCK // 2)))].reshape(-1, BLOCK)
    return (pair_PB * factor_P[:, None]).astype(dtype).reshape(-1)[:count]


def nf4_matvec(
    x_MI: mx.array,
    w: Parts,
    outputs: int,
    expert_M: mx.array | None = None,
    around: Around | None = None,
    out: mx.Dtype | None = None,
) -> mx.array:
    """x_MI W^T, [M, outputs] in `out`, by default x's dtype, straight from the codes, summed in float32; I a multiple
    of 64. With expert_M the parts hold E matrices, and row m is multiplied by number expert_M[m]; x may then have fewer
    rows, each of which serves as many neighbours. `around`: what else the launch does. For few rows, as in decoding:
    each reads all codes of its matrix. No gradient. Raises ValueError for sizes that do not fit.
    """
    around, out = around or Around(), out or x_MI.dtype
    rows, I = x_MI.shape
    matrices = w.codes.size // w.codes.shape[-1]
    if I % BLOCK or w.codes.shape[-1] * 2 != outputs * I or (expert_M is None and matrices != 1):
        raise ValueError(f"nf4_matvec: x {x_MI.shape} and {outputs} outputs do not fit codes of shape {w.codes.shape}")
    M = rows if expert_M is None else expert_M.size
    if M % rows:
        raise ValueError(f"nf4_matvec: {M} rows cannot come from {rows}")
    if plain(x_MI, w.codes):
        return around.after(_matvec_reference(around.before(x_MI), w, outputs, expert_M), expert_M, out)
    width = 8 if launch.gpu_geometry() else 2
    together, simdgroups = rows_together(M, expert_M), _MATVEC_THREADS // _SIMD
    split = splits(-(-outputs // _GPU_OUTS) * -(-M // together), I // width // _GPU_AT_ONCE[0])
    few = _GPU_AT_ONCE if together < _ROWS_AT_ONCE else _GPU_AT_ONCE[-1:]  # for want of registers
    at_once = next((n for n in few if I // width % (_SIMD * split * n) == 0), 1)
    y: mx.array = _MATVEC(
        [
            x_MI,
            _numbers(()) if expert_M is None else expert_M.astype(mx.int32),
            *w.for_rows(width),
            *around.arrays(),
        ],
        template={
            "V": width, "RUN": 1, "AT_ONCE": at_once, "OUTS": _GPU_OUTS, "SG": simdgroups, "SPLIT": split,
            "ROWS": together, "I_SIZE": I, "O_SIZE": outputs, "GATHER": expert_M is not None, "SHARE": M // rows,
            **around.template(x_MI, out),
        },
        grid=(-(-outputs // (_GPU_OUTS * simdgroups // split)) * _MATVEC_THREADS, -(-M // together), 1),
        threadgroup=(_MATVEC_THREADS, 1, 1),
        host_template={"RUN": BLOCK // width, "AT_ONCE": 1, "OUTS": _HOST_OUTS, "SG": 1, "SPLIT": 1, "ROWS": 1},
        host_grid=(-(-outputs // _HOST_OUTS), M, 1),
        output_shapes=[(M, outputs)],
        output_dtypes=[out],
    )[0]  # fmt: skip
    return y


def rows_together(M: int, expert_M: mx.array | None) -> int:
    """How many rows of a matrix-vector product share the reading of a GPU's matrix: few numbers, for few kernels."""
    return 1 if expert_M is not None else next(n for n in (1, 2, _ROWS_AT_ONCE) if n >= min(M, _ROWS_AT_ONCE))


def splits(simdgroups: int, packs: int) -> int:
    """Over how many simdgroups a row's columns are spread, so that a GPU's processors are busy where there are few
    outputs: `simdgroups` without it, `packs` a row to be shared out among their lanes.
    """
    return next(
        n for n in (1, 2, 4, 8) if n == _MOST_SPLIT or n * simdgroups >= _BUSY or 2 * n * _SIMD > max(packs, _SIMD)
    )


def _matvec_reference(x_MI: mx.array, w: Parts, outputs: int, expert_M: mx.array | None) -> mx.array:
    rows, (count, I) = [], x_MI.shape
    codes, scale_codes, scale_absmax = (a.reshape(-1, a.shape[-1]) for a in (w.codes, w.scale_codes, w.scale_absmax))
    M = count if expert_M is None else expert_M.size
    for m in range(M):
        e = mx.array(0) if expert_M is None else expert_M[m]
        factor_P = expand_scales(scale_codes[e], scale_absmax[e], w.offset[e].reshape(1))
        w_OI = _dequantize_reference(codes[e], factor_P, outputs * I, mx.float32).reshape(outputs, I)
        rows.append(w_OI @ x_MI[m // (M // count)])
    return mx.stack(rows)


def nf4_matmul(x: mx.array, w: Quantized) -> mx.array:
    """x_..I W_OI^T in x's dtype, W frozen: the gradient goes to x alone. W is dequantised again in the backward pass,
    so that its dense form never outlives one product.
    """

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        rows = x.size // x.shape[-1]
        if rows <= (GPU_ROWS if launch.gpu_geometry() else HOST_ROWS) and x.shape[-1] % BLOCK == 0 and not plain(x):
            return detached(nf4_matvec(x.reshape(rows, -1), w.parts, w.shape[0]).reshape(*x.shape[:-1], w.shape[0]))
        return detached(x @ w.dequantize(x.dtype, after=x).T)

    @product.vjp
    def product_vjp(x: mx.array, dy: mx.array, _: mx.array) -> mx.array:
        return detached(dy @ w.dequantize(dy.dtype, after=dy))

    y: mx.array = product(x)  # type: ignore[assignment]
    return y
