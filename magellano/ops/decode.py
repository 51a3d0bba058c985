"""Operations of a decoding step, where a few rows meet every weight once: as little as possible beside the reading, and
few launches. Without gradient. The product with NF4 matrices is `nf4_matvec`.

Shapes: B sequences, M rows of y, I in (of conv_step: d_inner), O out, E experts, K d_conv, r rank, V vocabulary, D
width.
"""

import functools

from magellano.backend import mx
from magellano.ops import around as surroundings
from magellano.ops import launch
from magellano.ops.around import Around, bits, placeholder
from magellano.ops.causal_conv import reference as conv_reference
from magellano.ops.chain import row_stride
from magellano.ops.host import KERNELS
from magellano.ops.launch import Kernel
from magellano.ops.lazy import constant, plain
from magellano.ops.nf4 import BLOCK, SCALE_BLOCK, Parts, rows_together, scale_values, splits, values

_MATVEC = Kernel("matvec", ("x", "expert", "w", *surroundings.INPUTS), ("y",), header=surroundings.HEADER, wide=("x",))
_CONV = Kernel("conv_step", ("x", "weight", "bias", "state"), ("y", "next"))
_ROWS = Kernel(
    "nf4_rows",
    ("number", "codes", "scale_codes", "scale_absmax", "offset", "scales", "values", "a", "b"),
    ("y",),
    header=(KERNELS / "nf4.h").read_text(encoding="utf-8"),
)
_THREADS, _SIMD = 256, 32  # of a threadgroup and of a simdgroup on a GPU
_SMALL_THREADS, _HOST_BYTES, _HOST_CHANNELS = 128, 32, 64  # of conv_step and nf4_rows


def matvec(
    x_MI: mx.array,
    w: mx.array,
    expert_M: mx.array | None = None,
    around: Around | None = None,
    out: mx.Dtype | None = None,
) -> mx.array:
    """x_MI W^T, [M, O] in `out`, by default x's dtype, for a dense W [O, I], summed in float32; with expert_M and W
    [E, O, I] as in `nf4_matvec`. `around`: what else the launch does. On a GPU every few rows read W anew.
    """
    around, out = around or Around(), out or x_MI.dtype
    rows, I = x_MI.shape
    O, M = w.shape[-2], rows if expert_M is None else expert_M.size
    if not launch.gpu_geometry() or plain(x_MI):
        return around.after(_product(around.before(x_MI), w, expert_M), expert_M, out)
    pack = 16 // w.dtype.size
    pack = pack if I % pack == 0 else 1
    together, simdgroups, outs = rows_together(M, expert_M), _THREADS // _SIMD, 4 if O >= 1024 else 1
    split = splits(-(-O // outs) * -(-M // together), I // pack)
    at_once = next(n for n in (1, 2, 4) if n == 4 or n * split * _SIMD >= I // pack)
    y: mx.array = _MATVEC(
        [x_MI, _no_experts() if expert_M is None else expert_M.astype(mx.int32), w, *around.arrays()],
        template={
            "TW": w.dtype, "V": pack, "AT_ONCE": at_once, "OUTS": outs, "SG": simdgroups, "SPLIT": split,
            "ROWS": together, "I_SIZE": I, "X_ROW": row_stride(x_MI), "O_SIZE": O, "GATHER": expert_M is not None,
            "SHARE": M // rows, **around.template(x_MI, out),
        },
        grid=(-(-O // (outs * simdgroups // split)) * _THREADS, -(-M // together), 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(M, O)],
        output_dtypes=[out],
    )[0]  # fmt: skip
    return y


@functools.cache
def _no_experts() -> mx.array:
    """Stands in for the experts' numbers."""
    return constant([0] * 8, mx.int32)


def _product(x_MI: mx.array, w: mx.array, expert_M: mx.array | None) -> mx.array:
    """By definition, in float32."""
    w = w.astype(mx.float32)
    if expert_M is None:
        return x_MI @ w.T
    row_M = mx.arange(expert_M.size) // (expert_M.size // x_MI.shape[0])
    return mx.gather_mm(x_MI[:, None], w.swapaxes(1, 2), row_M, expert_M).squeeze(1)


def conv_step(x_BX: mx.array, weight_IK: mx.array, bias_I: mx.array, state_BKI: mx.array) -> tuple[mx.array, mx.array]:
    """One step of `causal_conv` and its next state, in one launch. x may be wider: its first I columns count."""
    (B, wide), (I, K) = x_BX.shape, weight_IK.shape
    if plain(x_BX, state_BKI) or wide % I or K == 1:
        x_B1I = x_BX[:, None, :I]
        y = conv_reference(x_B1I, weight_IK, bias_I, None, state_BKI)
        return y.squeeze(1), mx.concatenate([state_BKI[:, 1:], x_B1I.astype(state_BKI.dtype)], axis=1)[:, : K - 1]
    threads = launch.threads(_SMALL_THREADS)
    y_BI, next_BKI = _CONV(
        [x_BX, weight_IK, bias_I, state_BKI],
        template={"T": x_BX.dtype, "K": K, "WIDTH": wide // I, "CPT": 1},
        grid=(-(-I // threads) * threads, B, 1),
        threadgroup=(threads, 1, 1),
        host_template={"CPT": _HOST_CHANNELS},
        host_grid=(-(-I // _HOST_CHANNELS), B, 1),
        output_shapes=[(B, I), state_BKI.shape],
        output_dtypes=[x_BX.dtype, x_BX.dtype],
    )
    return y_BI, next_BKI


def nf4_rows(
    number_M: mx.array,
    w: Parts,
    width: int,
    out: mx.Dtype,
    a_rD: mx.array | None = None,
    b_Vr: mx.array | None = None,
    scale: float = 0.0,
) -> mx.array:
    """Rows of an NF4 matrix [V, D] by number, [M, D] in `out`, with its adapter's part if any, float32 inside; D =
    `width`, a multiple of 64. For a few rows: nothing of all rows is made.
    """
    assert width % BLOCK == 0, f"rows of {width} values are no whole blocks"
    M = number_M.size
    if plain(number_M, w.codes):
        return _rows_reference(number_M, w, width, a_rD, b_Vr, scale).astype(out)
    arrays = [placeholder() if a is None else a for a in (a_rD, b_Vr)]
    y: mx.array = _ROWS(
        [
            number_M.astype(mx.int32), w.codes, w.scale_codes, w.scale_absmax, w.offset, scale_values(), values(),
            *arrays,
        ],
        template={
            "T": out, "I_SIZE": width, "BYTES": 1,
            "RANK": 0 if a_rD is None else a_rD.shape[0], "SCALE_BITS": bits(scale),
        },
        grid=(-(-(width // 2) // _SMALL_THREADS) * _SMALL_THREADS, M, 1),
        threadgroup=(_SMALL_THREADS, 1, 1),
        host_template={"BYTES": _HOST_BYTES},
        host_grid=(-(-(width // 2) // _HOST_BYTES), M, 1),
        output_shapes=[(M, width)],
        output_dtypes=[out],
    )[0]  # fmt: skip
    return y


def _rows_reference(
    number_M: mx.array, w: Parts, width: int, a_rD: mx.array | None, b_Vr: mx.array | None, scale: float
) -> mx.array:
    blocks = width // BLOCK
    block_MJ = number_M[:, None] * blocks + mx.arange(blocks)
    factor_MJ = scale_values()[w.scale_codes[block_MJ]] * w.scale_absmax[block_MJ // SCALE_BLOCK] + w.offset[:1]
    codes_MC = w.codes.reshape(-1, width // 2)[number_M]
    values_MD = values()[mx.stack([codes_MC >> 4, codes_MC & 15], axis=-1).reshape(-1, width)]
    y_MD = (values_MD.reshape(-1, blocks, BLOCK) * factor_MJ[..., None]).reshape(-1, width)
    return y_MD if a_rD is None or b_Vr is None else y_MD + scale * (b_Vr[number_M] @ a_rD).astype(mx.float32)
