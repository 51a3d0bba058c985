"""Sums of looked-up rows against NumPy in float64, in every dialect."""

import numpy as np
import pytest

from magellano.backend import mx, on_gpu
from magellano.ops.add_rows import add_rows


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize(("V", "R", "M"), [(5, 3, 0), (1, 8, 4), (50, 72, 33), (300, 65, 513)])
def test_against_float64(V: int, R: int, M: int, dtype: mx.Dtype, dialect: str) -> None:
    rng = np.random.default_rng(M)
    before = mx.array(rng.standard_normal((V, R)), dtype=mx.float32).astype(dtype)
    y, index = rng.standard_normal((M, R)).astype(np.float32), rng.integers(0, max(1, V // 2), M)
    found = add_rows(before, mx.array(y), mx.array(index.astype(np.int32)))
    assert found.dtype == dtype
    right = np.array(before.astype(mx.float32), np.float64)
    np.add.at(right, index, y)
    tolerance = {mx.float32: 1e-6, mx.float16: 1e-3, mx.bfloat16: 8e-3}[dtype]
    assert np.abs(np.array(found.astype(mx.float32)) - right).max() <= tolerance * np.abs(right).max()


def test_equal_inputs_give_equal_bits(dialect: str) -> None:
    if dialect == "reference" and on_gpu():
        pytest.skip("MLX's scatter on a GPU adds by atomics, in any order: that is why there is a kernel")
    before, y = mx.random.normal((10, 16)), mx.random.normal((200, 16))
    index = mx.random.randint(0, 10, (200,))
    np.testing.assert_array_equal(add_rows(before, y, index), add_rows(before, y, index))
