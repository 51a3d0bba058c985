"""Sums of squares over many arrays, for the norm of all gradients: one launch an array, none at the end of each.

Shapes: P parts, n elements.
"""

from magellano.backend import mx
from magellano.ops.launch import Kernel, gpu_geometry
from magellano.ops.lazy import plain

PARTS = 256
_SQUARE_SUM = Kernel("square_sum", ("g", "total"), ("out",))
_THREADS = 256  # of a threadgroup on a GPU


def add_squares(total_P: mx.array, g: mx.array) -> mx.array:
    """total_P, float32 [256], plus the squares of g, of any float dtype and shape, spread over the parts; summed in
    float32 and always in the same order. No gradient.
    """
    assert total_P.shape == (PARTS,), total_P.shape
    g_n = g.reshape(-1)
    if not g.size or plain(g, total_P):
        padded = mx.pad(g_n.astype(mx.float32), (0, -g.size % PARTS)).reshape(PARTS, -1)
        return total_P + padded.square().sum(axis=1) if g.size else total_P
    pack = 16 // g.dtype.size
    pack = pack if gpu_geometry() and g.size % pack == 0 else 1
    out: mx.array = _SQUARE_SUM(
        [g_n, total_P],
        template={"T": g.dtype, "SG": _THREADS // 32, "V": pack, "PARTS": PARTS},
        grid=(PARTS * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        host_template={"SG": 1},
        host_grid=(PARTS, 1, 1),
        output_shapes=[(PARTS,)],
        output_dtypes=[mx.float32],
    )[0]
    return out


def no_squares() -> mx.array:
    """What a sum starts from."""
    return mx.zeros((PARTS,))
