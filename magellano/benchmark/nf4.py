"""NF4: dequantising and quantising a matrix, against plain MLX and MLX's own 4-bit format, and the copy bandwidth."""

from typing import Any

from magellano import nf4
from magellano.backend import mx, on_gpu
from magellano.benchmark import machine
from magellano.ops import launch
from magellano.ops.launch import Dialect


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
        table.append(machine.row(f"dequantise to {dtype}", ours, plain, share, written_gb_s=written / ours / 1e9))
    quantize = machine.seconds(lambda: list(nf4.quantize(w).arrays().values()), 2)
    with launch.use(Dialect.REFERENCE):
        plain = machine.seconds(lambda: list(nf4.quantize(w).arrays().values()), 1)
    share = (w.nbytes + q.nbytes) / quantize / copy
    table.append(machine.row("quantise", quantize, plain, share, written_gb_s=q.nbytes / quantize / 1e9))
    return {
        **machine.where(),
        "weights": w.size,
        "copy_gb_s": copy / 1e9,
        "mlx_affine_dequantise_ms": machine.seconds(lambda: mx.dequantize(*affine, group_size=64, bits=4), 3) * 1e3,
        "results": table,
    }
