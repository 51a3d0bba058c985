"""Routing and the grouped product against dense formulas in float64, in every dialect."""

import numpy as np
import pytest

from magellano import nf4
from magellano.backend import mx
from magellano.ops import grouped_matmul, route

SIZES = {
    "even": [5, 5, 5, 5],
    "uneven": [1, 0, 12, 7],
    "first and last empty": [0, 9, 11, 0],
    "all to one": [0, 0, 20, 0],
}


@pytest.mark.parametrize(("M", "E", "k"), [(1, 1, 1), (50, 8, 2), (33, 5, 5)])
def test_route(M: int, E: int, k: int, dialect: str) -> None:
    rng = np.random.default_rng(M)
    logits, dgate = rng.standard_normal((M, E)).astype(np.float32) * 3, rng.standard_normal((M, k))
    gate, expert = route(mx.array(logits), k)
    right = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(expert, right)
    assert expert.dtype == mx.int32
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(1, keepdims=True)
    chosen = np.take_along_axis(p, right, 1)
    total = chosen.sum(1, keepdims=True)
    np.testing.assert_allclose(gate, chosen / total, rtol=1e-5)
    gradient = mx.grad(lambda x: (route(x, k)[0] * mx.array(dgate, dtype=mx.float32)).sum())(mx.array(logits))
    q = chosen / total
    expected = np.zeros((M, E))
    np.put_along_axis(expected, right, q * (dgate - (q * dgate).sum(1, keepdims=True)), 1)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_route_of_equal_and_huge_logits(dialect: str) -> None:
    gate, expert = route(mx.array([[1.0, 1.0, 1.0], [1e4, -1e4, 1e4], [0.0, 1e4, 2.0]]), 2)
    np.testing.assert_array_equal(expert, [[0, 1], [0, 2], [1, 2]])
    np.testing.assert_allclose(gate, [[0.5, 0.5], [0.5, 0.5], [1.0, 0.0]], atol=1e-6)


def expected(x: np.ndarray, w: np.ndarray, dy: np.ndarray, sizes: list[int]) -> tuple[np.ndarray, ...]:
    """y, dx and dw in float64 by the dense formula: every row times every expert, one of them chosen."""
    x, w, dy = (a.astype(np.float64) for a in (x, w, dy))
    chosen = np.repeat(np.eye(len(sizes)), sizes, axis=0)
    y = np.einsum("se,sd,efd->sf", chosen, x, w)
    return y, np.einsum("se,sf,efd->sd", chosen, dy, w), np.einsum("se,sf,sd->efd", chosen, dy, x)


def arrays(sizes: list[int], F: int = 24, D: int = 64) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    S, E = sum(sizes), len(sizes)
    return [rng.standard_normal(s).astype(np.float32) for s in ((S, D), (E, F, D), (S, F))]


@pytest.mark.parametrize("case", SIZES)
def test_dense_experts(case: str, dialect: str) -> None:
    x, w, dy = arrays(SIZES[case])
    (y,), (dx, dw) = mx.vjp(lambda x, w: grouped_matmul(x, w, SIZES[case]), [mx.array(x), mx.array(w)], [mx.array(dy)])
    for found, right in zip((y, dx, dw), expected(x, w, dy, SIZES[case]), strict=True):
        np.testing.assert_allclose(found, right, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("case", SIZES)
def test_quantised_experts(case: str, dialect: str) -> None:
    x, w, dy = arrays(SIZES[case])
    experts = [nf4.quantize(mx.array(e)) for e in w]
    dense = np.stack([np.array(e.dequantize()) for e in experts])
    (y,), (dx,) = mx.vjp(lambda x: grouped_matmul(x, experts, SIZES[case]), [mx.array(x)], [mx.array(dy)])
    right_y, right_dx, _ = expected(x, dense, dy, SIZES[case])
    np.testing.assert_allclose(y, right_y, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(dx, right_dx, rtol=1e-5, atol=2e-5)


def test_no_rows_at_all(dialect: str) -> None:
    assert grouped_matmul(mx.zeros((0, 64)), mx.zeros((3, 8, 64)), [0, 0, 0]).shape == (0, 8)


def test_only_one_expert_is_dense_at_a_time(dialect: str) -> None:
    if dialect == "fibers":
        pytest.skip("as on the host, and slow")
    E, F, D = 8, 512, 512
    experts = [nf4.quantize(mx.random.normal((F, D))) for _ in range(E)]
    x = mx.random.normal((E * 4, D))
    mx.eval(x)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.grad(lambda x: grouped_matmul(x, experts, [4] * E).sum())(x))
    # The plain form of the dequantisation has temporaries of about twice the matrix; all experts would be eight.
    assert mx.get_peak_memory() - before < 4.5 * (F * D * 4)


def test_a_gradient_of_the_weights_costs_one_stack() -> None:
    E, F, D = 8, 256, 256
    x, w = mx.random.normal((E * 4, D)), mx.random.normal((E, F, D))
    mx.eval(x, w)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.grad(lambda w: grouped_matmul(x, w, [4] * E).sum())(w))
    assert mx.get_peak_memory() - before < 2.5 * w.nbytes  # the parts and their stack; by MLX's own gradient over 8


def test_inside_checkpoint(dialect: str) -> None:
    x, w, _ = arrays(SIZES["uneven"])
    experts = [nf4.quantize(mx.array(e)) for e in w]

    def loss(x: mx.array) -> mx.array:
        return grouped_matmul(x, experts, SIZES["uneven"]).square().sum()

    plain, checkpointed = mx.grad(loss)(mx.array(x)), mx.grad(mx.checkpoint(loss))(mx.array(x))
    np.testing.assert_array_equal(plain, checkpointed)
