"""When MLX computes: host kernels need values at once, and on a CPU computing early is what frees memory early."""

from magellano.backend import mx, on_gpu
from magellano.ops import launch
from magellano.ops.launch import Dialect


def plain(*arrays: mx.array) -> bool:
    """True where an operation's reference must serve: where it is asked for, and on a CPU inside mx.compile or mx.vmap,
    where the arrays have no values that a kernel could read.
    """
    chosen = launch.dialect()
    return chosen is Dialect.REFERENCE or (chosen is Dialect.HOST and launch.traced(*arrays))


def settle(*arrays: mx.array) -> None:
    """On a CPU: compute now, so that what the arrays were made of is freed. Does nothing inside mx.compile."""
    if not on_gpu():
        launch.traced(*arrays)
