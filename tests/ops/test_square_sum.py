"""Sums of squares against float64, in every dialect."""

import numpy as np
import pytest

from magellano.backend import mx
from magellano.ops.square_sum import PARTS, add_squares


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("sizes", [(1,), (7, 0, 300), (64, 4099), (100_000, 8)])
def test_the_squares_of_many_arrays(sizes: tuple[int, ...], dtype: mx.Dtype, dialect: str) -> None:
    rng = np.random.default_rng(sum(sizes))
    arrays = [mx.array(rng.standard_normal(n), dtype=mx.float32).astype(dtype) for n in sizes]
    total = mx.zeros((PARTS,))
    for a in arrays:
        total = add_squares(total, a)
    right = sum((np.array(a.astype(mx.float32), np.float64) ** 2).sum() for a in arrays)
    assert total.dtype == mx.float32
    assert float(total.sum()) == pytest.approx(right, rel=1e-5)


def test_what_is_not_finite_shows_and_equal_inputs_give_equal_bits(dialect: str) -> None:
    g = mx.random.normal((3, 1000))
    both = [np.array(add_squares(mx.zeros((PARTS,)), g)) for _ in range(2)]
    np.testing.assert_array_equal(*both)
    for bad in (mx.inf, mx.nan):
        assert not np.isfinite(float(add_squares(mx.zeros((PARTS,)), mx.array([1.0, bad, 2.0])).sum()))
