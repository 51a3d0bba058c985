"""The gradient of looking rows up, added to another gradient of the same matrix, as a tied embedding has them.

MLX's own scatters with atomics on a GPU, in whatever order threads come; here equal inputs give equal bits.

Shapes: V rows of the matrix, R their width, M rows looked up.
"""

from magellano.backend import mx
from magellano.ops.launch import Kernel, gpu_geometry
from magellano.ops.lazy import plain

_ADD_ROWS = Kernel("add_rows", ("before", "y", "sorted", "order"), ("out",))
_THREADS = 64  # of a threadgroup on a GPU
_COLUMNS = 4096  # of one host thread


def add_rows(before_VR: mx.array, y_MR: mx.array, index_M: mx.array) -> mx.array:
    """before[v] plus the sum of y[m] over all m with index[m] = v, in float32, then in before's dtype. No gradient."""
    (V, R), M = before_VR.shape, index_M.size
    if not M or plain(before_VR, y_MR, index_M):
        summed = mx.zeros((V, R)).at[index_M].add(y_MR.astype(mx.float32))
        return (before_VR.astype(mx.float32) + summed).astype(before_VR.dtype)
    key_M = index_M.astype(mx.int64) * M + mx.arange(M)  # equal indices in their order
    order_M = mx.argsort(key_M).astype(mx.int32)
    threads = _THREADS if gpu_geometry() else 1
    out: mx.array = _ADD_ROWS(
        [before_VR, y_MR, index_M.astype(mx.int32)[order_M], order_M],
        template={"T": before_VR.dtype, "CPT": 1},
        grid=(-(-R // threads) * threads, V, 1),
        threadgroup=(threads, 1, 1),
        host_template={"CPT": _COLUMNS},
        host_grid=(-(-R // _COLUMNS), V, 1),
        output_shapes=[(V, R)],
        output_dtypes=[before_VR.dtype],
    )[0]
    return out
