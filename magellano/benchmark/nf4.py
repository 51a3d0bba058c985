"""NF4: dequantising and quantising a matrix and the matrix-vector product, against plain MLX and MLX's own 4-bit
format, and the copy bandwidth. `chain_ms`: the device's time of one of several runs in one lazy graph, each of which
reads something that the one before wrote, with the small kernel that makes it (see scan.py for why not mx.depends).
"""

import itertools
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from magellano import nf4
from magellano.backend import compute_dtype, mx, on_gpu
from magellano.benchmark import machine
from magellano.ops import launch
from magellano.ops.launch import Dialect
from magellano.ops.nf4 import nf4_matvec


def _chain(step: Callable[[mx.array | None], mx.array], length: int) -> float:
    """Seconds of one of `length` steps in one lazy graph, each waiting for the one before."""

    def work() -> mx.array:
        made = step(None)
        for _ in range(length - 1):
            made = step(made)
        return made

    return machine.on_device(work) / length


def _matvec(copy: float) -> dict[str, Any]:
    """One token times 2048 -> 8192, over 16 matrices in turn, more than caches hold; each product takes a part of the
    one before.
    """
    matrices = [nf4.quantize(mx.random.normal((8192, 2048)) / 45) for _ in range(machine.pick(4, 16))]
    x = mx.random.normal((1, 2048)).astype(compute_dtype("auto"))
    mx.eval(x, [list(q.arrays().values()) for q in matrices])
    turn = itertools.cycle(matrices)

    def after(last: mx.array | None) -> mx.array:
        return x if last is None else mx.split(last, [2048], axis=1)[0]

    def product(last: mx.array | None) -> mx.array:
        return nf4_matvec(after(last), next(turn).parts, 8192)

    def dense(last: mx.array | None) -> mx.array:
        return after(last) @ next(turn).dequantize(x.dtype, after=last).T

    ours, plain = _chain(product, 64 if on_gpu() else 4), _chain(dense, machine.pick(2, 16))
    return machine.row("matrix-vector 2048 -> 8192", ours, plain, matrices[0].nbytes / ours / copy)


def run() -> dict[str, Any]:
    """Times in ms; `ratio` is to the plain-MLX reference; the ceiling is the copy bandwidth for the bytes moved."""
    rows, columns = machine.pick(4096, 32768), machine.pick(2048, 8192)
    w = mx.random.normal((rows, columns))
    q = nf4.quantize(w)
    affine = mx.quantize(w, group_size=64, bits=4)
    mx.eval(w, affine, *q.arrays().values())
    copy = machine.copy_bandwidth()
    table = []
    for dtype in (mx.bfloat16,) if on_gpu() else (mx.float32, mx.bfloat16):
        ours = machine.seconds(lambda dtype=dtype: q.dequantize(dtype))  # type: ignore[misc]
        with launch.use(Dialect.REFERENCE):
            plain = machine.seconds(lambda dtype=dtype: q.dequantize(dtype), 2)  # type: ignore[misc]
        written = w.size * dtype.size
        share = (written + q.nbytes) / ours / copy

        @mx.compile
        def later(last: mx.array) -> mx.array:
            return q.scale_offset + 0.0 * last[0, :1].astype(mx.float32)

        def again(last: mx.array | None, dtype: mx.Dtype = dtype) -> mx.array:
            if last is None:
                return q.dequantize(dtype)
            return replace(q, scale_offset=later(last)).dequantize(dtype)

        chain = _chain(again, 6)
        facts = {"chain_ms": chain * 1e3, "written_gb_s": written / ours / 1e9, "chain_gb_s": written / chain / 1e9}
        table.append(machine.row(f"dequantise to {dtype}", ours, plain, share, **facts))
    quantize = machine.seconds(lambda: list(nf4.quantize(w).arrays().values()), 2)
    with launch.use(Dialect.REFERENCE):
        plain = machine.seconds(lambda: list(nf4.quantize(w).arrays().values()), 1)
    share = (w.nbytes + q.nbytes) / quantize / copy
    table.append(machine.row("quantise", quantize, plain, share, written_gb_s=q.nbytes / quantize / 1e9))
    table.append(_matvec(copy))
    return {
        **machine.where(),
        "weights": w.size,
        "copy_gb_s": copy / 1e9,
        "mlx_affine_dequantise_ms": machine.seconds(lambda: mx.dequantize(*affine, group_size=64, bits=4), 3) * 1e3,
        "results": table,
    }
