"""What MLX keeps in memory inside mx.grad, and how `detached` frees it."""

import numpy as np
import pytest

from magellano.backend import mx, on_gpu
from magellano.ops.lazy import detached


def peak_of_gradient(size: int, cut: bool) -> float:
    """Arrays of `size` alive at the peak, for a chain of products whose large temporaries each serve once."""

    @mx.custom_function
    def layer(x: mx.array) -> mx.array:
        large = mx.ones((size,)) * x[0]
        y = large[:4] + x
        return detached(y) if cut else y

    @layer.vjp
    def layer_vjp(_x: mx.array, dy: mx.array, _y: mx.array) -> mx.array:
        return dy

    def loss(x: mx.array) -> mx.array:
        for _ in range(20):
            x = layer(x)
            mx.eval(x)
        return x.sum()

    x = mx.ones((4,))
    mx.eval(x)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.grad(loss)(x))
    return (mx.get_peak_memory() - before) / (4 * size)


@pytest.mark.skipif(on_gpu(), reason="only a CPU computes early")
def test_detached_frees_what_an_array_was_made_of() -> None:
    assert peak_of_gradient(1 << 16, cut=False) > 15
    assert peak_of_gradient(1 << 16, cut=True) < 5


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.int32])
def test_detached_is_a_copy_of_the_same_values(dtype: mx.Dtype) -> None:
    a = (mx.arange(12).reshape(3, 4) * 3).astype(dtype).T
    b = detached(a)
    assert b.dtype == dtype
    np.testing.assert_array_equal(a.astype(mx.float32), b.astype(mx.float32))
    assert detached(a[:0]).shape == (0, 3)
