"""When MLX computes, and what it keeps: host kernels need values at once, and on a CPU computing early frees memory
early.

Inside mx.grad and mx.vjp MLX keeps the graph of every array, computed or not, and with it all that the array was made
of: mx.eval there frees nothing, and mx.checkpoint saves nothing. `detached` cuts an array loose.
"""

from collections.abc import Sequence

import numpy as np

from magellano.backend import mx, on_gpu
from magellano.ops import host, launch
from magellano.ops.launch import Dialect


def plain(*arrays: mx.array) -> bool:
    """True where an operation's reference must serve: where it is asked for, and on a CPU inside mx.compile or mx.vmap,
    where the arrays have no values that a kernel could read.
    """
    chosen = launch.dialect()
    return chosen is Dialect.REFERENCE or (chosen is Dialect.HOST and launch.traced(*arrays))


def settle(*arrays: mx.array) -> None:
    """On a CPU: compute now, so that what the arrays were made of can be freed. Does nothing inside mx.compile."""
    if not on_gpu():
        launch.traced(*arrays)


def detached(a: mx.array) -> mx.array:
    """On a CPU: `a` as a copy that remembers nothing of its making, so that this is freed even inside mx.grad. For use
    inside an mx.custom_function, whose gradient does not follow the making anyway. Elsewhere, and inside mx.compile,
    `a` itself.
    """
    if on_gpu() or launch.traced(a):
        return a
    copy = mx.array(np.array(host.view(mx.contiguous(a)), copy=False)) if a.size else mx.zeros(a.shape, a.dtype)
    return copy.view(mx.bfloat16) if a.dtype == mx.bfloat16 else copy


def resident(a: mx.array) -> mx.array:
    """A one-dimensional array that kernels read often, where a GPU reads it without a fault, maybe with zeros behind.

    MLX on CUDA keeps arrays of 8 bytes and fewer, and all that come from the host, in memory that host and device
    share: the host's next write to a neighbour takes the page away, and the kernel that reads it again waits for it,
    up to 0.15 ms. What a kernel wrote into an array of 16 bytes stays on the device.
    """
    if not on_gpu():
        return a
    return mx.pad(a, (0, max(1, 16 - a.size)))


def constant(values: Sequence[float], dtype: mx.Dtype) -> mx.array:
    """`values` as a `resident` array, computed now. For a cache: a kernel's tables and placeholders."""
    made = resident(mx.array(list(values), dtype=dtype))
    mx.eval(made)
    return made
