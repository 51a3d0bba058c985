"""What is done to many arrays at once, against NumPy, in every dialect."""

import numpy as np
import pytest

from magellano.backend import mx
from magellano.ops.many import add_squares, join, narrow, no_squares


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("sizes", [(1,), (7, 0, 300), (64, 4100) * 5, (100_000, 8), (1 << 20, 8)])
def test_the_squares_of_many_arrays(sizes: tuple[int, ...], dtype: mx.Dtype, dialect: str) -> None:
    rng = np.random.default_rng(sum(sizes))
    arrays = [mx.array(rng.standard_normal(n), dtype=mx.float32).astype(dtype) for n in sizes]
    total = add_squares(no_squares(), arrays)
    right = sum((np.array(a.astype(mx.float32), np.float64) ** 2).sum() for a in arrays)
    assert total.dtype == mx.float32
    assert float(total.sum()) == pytest.approx(right, rel=1e-5)


def test_squares_of_mixed_types_and_what_is_not_finite(dialect: str) -> None:
    g = mx.random.normal((3, 1000))
    mixed = add_squares(no_squares(), [g, g.astype(mx.bfloat16), g[0]])
    right = 2 * np.square(np.array(g, np.float64)).sum() + np.square(np.array(g[0], np.float64)).sum()
    assert float(mixed.sum()) == pytest.approx(right, rel=3e-3)
    both = [np.array(add_squares(no_squares(), [g])) for _ in range(2)]
    np.testing.assert_array_equal(*both)
    for bad in (mx.inf, mx.nan):
        assert not np.isfinite(float(add_squares(no_squares(), [g, mx.array([1.0, bad, 2.0])]).sum()))


@pytest.mark.parametrize("order", [None, (0, 1, 2), (2, 0, 1)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_narrow(dtype: mx.Dtype, order: tuple[int, ...] | None, dialect: str) -> None:
    rng = np.random.default_rng(1)
    arrays = [mx.array(rng.standard_normal((3, *shape)), dtype=mx.float32) for shape in ((5,), (4, 8), (1, 3)) * 4]
    found = narrow(arrays, dtype, order)
    assert len(found) == len(arrays)
    for a, b in zip(arrays, found, strict=True):
        assert b.dtype == dtype
        assert b.shape == a.shape
        np.testing.assert_array_equal(
            np.array(b.astype(mx.float32)), np.array(a.astype(dtype).astype(mx.float32))[list(order or (0, 1, 2))]
        )


@pytest.mark.parametrize("sizes", [(3,), (3, 4), (4, 8, 400), (5, 1, 7), tuple(range(4, 84, 4))])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_join(dtype: mx.Dtype, sizes: tuple[int, ...], dialect: str) -> None:
    arrays = [mx.random.normal((n,)).astype(dtype) for n in sizes]
    found = join(arrays)
    assert found.dtype == dtype
    np.testing.assert_array_equal(
        np.array(found.astype(mx.float32)), np.concatenate([np.array(a.astype(mx.float32)) for a in arrays])
    )
