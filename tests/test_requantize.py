"""NF4 that carries its error on, against rounding to nearest and against a plain loop in float64."""

import numpy as np
import pytest

from magellano import nf4, requantize
from magellano.backend import mx
from magellano.ops.nf4 import BLOCK, values

SHAPES = [(24, 128), (16, 64), (10, 3), (7, 100)]  # whole blocks, one a row, many rows a block, blocks across rows


def inputs(width: int, rank: int = 12, n: int = 600, seed: int = 0) -> mx.array:
    """Rows that lie mostly in a few directions, as activations do."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, min(rank, width))) @ rng.normal(size=(min(rank, width), width))
    return mx.array((x + 0.05 * rng.normal(size=x.shape)).astype(np.float32))


def weights(shape: tuple[int, int], seed: int = 1) -> mx.array:
    return mx.array(np.random.default_rng(seed).normal(size=shape).astype(np.float32))


def error(w: mx.array, tensor: nf4.NF4Tensor, x: mx.array) -> float:
    wanted = np.array(x, dtype=np.float64) @ np.array(w, dtype=np.float64).T
    got = np.array(x, dtype=np.float64) @ np.array(tensor.dequantize(mx.float32), dtype=np.float64).T
    return float(((got - wanted) ** 2).sum() / (wanted**2).sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_nearer_than_by_rounding_to_nearest(shape: tuple[int, int]):
    w, x = weights(shape), inputs(shape[1])
    tensor, carried, nearest = requantize.requantized(w, requantize.moment(x))
    assert error(w, tensor, x) == pytest.approx(carried, rel=1e-3)
    assert error(w, nf4.quantize(w), x) == pytest.approx(nearest, rel=1e-3)
    assert carried <= nearest
    assert shape[1] == 3 or carried < 0.6 * nearest


def test_it_is_the_loop_that_the_paper_has():
    """Column by column, the least-squares correction of the columns left, by solving for it anew each time."""
    w, x = weights((4, 10)), inputs(10, rank=4)
    h = requantize.moment(x)
    h += requantize.DAMPING * np.diag(h).mean() * np.eye(10)
    factor = np.repeat(np.array(nf4.quantize(w).factors(), dtype=np.float64), BLOCK)[:40].reshape(4, 10)
    table, left = np.array(values(), dtype=np.float64), np.array(w, dtype=np.float64)
    order, wanted = list(np.argsort(-np.diag(requantize.moment(x)), kind="stable")), np.empty((4, 10))
    for place, j in enumerate(order):
        wanted[:, j] = table[np.abs(left[:, j, None] / factor[:, j, None] - table).argmin(axis=1)] * factor[:, j]
        rest = order[place + 1 :]
        if rest:  # min over d of (e, d) h (e, d)^T, e being what was rounded off
            gained = np.linalg.solve(h[np.ix_(rest, rest)], h[rest, j])
            left[:, rest] -= np.outer(wanted[:, j] - left[:, j], gained)
    tensor, _, _ = requantize.requantized(w, requantize.moment(x))
    np.testing.assert_allclose(np.array(tensor.dequantize(mx.float32)), wanted, rtol=1e-5)


def test_an_adapter_smaller_than_half_a_step_survives():
    """To nearest, the base's own codes come back: the whole change is lost (mlx-lm issue 1564)."""
    grid = nf4.quantize(weights((32, 256)))
    base = grid.dequantize(mx.float32)
    rng = np.random.default_rng(5)
    b, a = rng.normal(size=(32, 4)), rng.normal(size=(4, 256))
    change = mx.array((0.02 * b @ a).astype(np.float32))
    assert np.abs(np.array(change)).mean() < 0.5 * np.diff(np.array(values())).mean() * np.array(grid.factors()).mean()
    x = inputs(256, rank=20)
    tensor, _, _ = requantize.requantized(base + change, requantize.moment(x), grid)
    effect = x @ change.T

    def lost(t: nf4.NF4Tensor) -> float:
        return (mx.linalg.norm(x @ (t.dequantize(mx.float32) - base - change).T) / mx.linalg.norm(effect)).item()

    assert lost(nf4.quantize(base + change)) > 0.8
    assert lost(tensor) < 0.4


def test_inputs_that_were_never_seen_are_rounded_to_nearest():
    w = weights((8, 64))
    tensor, carried, nearest = requantize.requantized(w, np.zeros((64, 64)))
    assert (carried, nearest) == (0, 0)
    assert mx.array_equal(tensor.codes, nf4.quantize(w).codes).item()


def test_zeros_and_an_odd_count_of_codes():
    w = mx.concatenate([mx.zeros((1, 65)), weights((2, 65))])
    tensor, _, _ = requantize.requantized(w, requantize.moment(inputs(65)))
    assert tensor.codes.size == -(-3 * 65 // 2)
    assert mx.isfinite(tensor.dequantize(mx.float32)).all().item()
