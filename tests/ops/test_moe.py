"""Routing and the grouped product against dense formulas in float64, in every dialect."""

import numpy as np
import pytest

from magellano import nf4
from magellano.backend import mx
from magellano.nf4 import NF4Stack
from magellano.ops import experts as operations
from magellano.ops import grouped_matmul
from magellano.ops.experts import Layer
from magellano.ops.moe import places, route

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
    gate, expert, *_ = route(mx.array(logits), k)
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
    gate, expert, *_ = route(mx.array([[1.0, 1.0, 1.0], [1e4, -1e4, 1e4], [0.0, 1e4, 2.0]]), 2)
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
    experts = NF4Stack.of([nf4.quantize(mx.array(e)) for e in w])
    dense = np.array(experts.dequantize())
    (y,), (dx,) = mx.vjp(lambda x: grouped_matmul(x, experts, SIZES[case]), [mx.array(x)], [mx.array(dy)])
    right_y, right_dx, _ = expected(x, dense, dy, SIZES[case])
    np.testing.assert_allclose(y, right_y, rtol=1e-5, atol=2e-5)
    np.testing.assert_allclose(dx, right_dx, rtol=1e-5, atol=2e-5)


def test_no_rows_at_all(dialect: str) -> None:
    assert grouped_matmul(mx.zeros((0, 64)), mx.zeros((3, 8, 64)), [0, 0, 0]).shape == (0, 8)


def test_only_one_expert_is_dense_at_a_time(dialect: str) -> None:
    if dialect not in ("reference", "host"):
        pytest.skip("a GPU's launches run ahead of what is freed")
    E, F, D = 8, 512, 512
    experts = NF4Stack.of([nf4.quantize(mx.random.normal((F, D))) for _ in range(E)])
    mx.eval(vars(experts.parts), [vars(t.parts) for t in experts.tensors])
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
    experts = NF4Stack.of([nf4.quantize(mx.array(e)) for e in w])

    def loss(x: mx.array) -> mx.array:
        return grouped_matmul(x, experts, SIZES["uneven"]).square().sum()

    plain, checkpointed = mx.grad(loss)(mx.array(x)), mx.grad(mx.checkpoint(loss))(mx.array(x))
    np.testing.assert_array_equal(plain, checkpointed)


@pytest.mark.parametrize(("M", "E", "k"), [(1, 1, 1), (50, 8, 2), (33, 5, 5), (300, 6, 3)])
def test_routing_sorts_copies(M: int, E: int, k: int, dialect: str) -> None:
    r = route(mx.array(np.random.default_rng(M).standard_normal((M, E)).astype(np.float32)), k)
    flat = np.array(r.expert_Mk).reshape(-1)
    order = np.argsort(flat, kind="stable")
    np.testing.assert_array_equal(r.order_S, order)
    np.testing.assert_array_equal(r.size_E, np.bincount(flat, minlength=E))
    rank = [(flat[:i] == e).sum() for i, e in enumerate(flat)]
    np.testing.assert_array_equal(np.array(r.rank_Mk).reshape(-1), rank)


LOADS = {"random": None, "all to one": 2, "even": "even"}


def feed_forward(u, logits, w1, w2, k, padded=None):  # type: ignore[no-untyped-def]
    routing = route(logits, k)
    at = places(routing, padded=padded)
    return operations.feed_forward(u, routing.gate_Mk, at, Layer(w1), Layer(w2))


def feed_forward_exactly(u, logits, w1, w2, dy, k):  # type: ignore[no-untyped-def]
    """y and the gradients of u, logits, w1 and w2 in float64: every token through every expert."""
    u, logits, w1, w2, dy = (np.asarray(a, np.float64) for a in (u, logits, w1, w2, dy))
    M, E = logits.shape
    chosen = np.zeros((M, E))
    np.put_along_axis(chosen, np.argsort(-logits, axis=1, kind="stable")[:, :k], 1.0, 1)
    p = np.exp(logits - logits.max(1, keepdims=True)) * chosen
    gate = p / p.sum(1, keepdims=True)
    h = np.einsum("md,efd->mef", u, w1)
    a = np.maximum(h, 0)
    each = np.einsum("mef,edf->med", a, w2)
    dgate = np.einsum("md,med->me", dy, each) * chosen
    deach = gate[..., None] * dy[:, None]
    dh = np.einsum("med,edf->mef", deach, w2) * (h > 0)
    return (
        np.einsum("me,med->md", gate, each), np.einsum("mef,efd->md", dh, w1),
        gate * (dgate - (gate * dgate).sum(1, keepdims=True)),
        np.einsum("mef,md->efd", dh, u), np.einsum("med,mef->edf", deach, a),
    )  # fmt: skip


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("load", LOADS)
def test_feed_forward(load: str, padded: bool, dialect: str) -> None:
    M, E, k, D, F = 45, 4, 2, 16, 24
    rng = np.random.default_rng(5)
    logits = rng.standard_normal((M, E)).astype(np.float32)
    if load == "all to one":
        logits[:, 2] += 5
    if load == "even":
        logits += 4 * np.eye(E, dtype=np.float32)[np.arange(M) % E]
    u, dy = (rng.standard_normal((M, D)).astype(np.float32) for _ in range(2))
    w1, w2 = rng.standard_normal((E, F, D)).astype(np.float32), rng.standard_normal((E, D, F)).astype(np.float32)
    inputs = [mx.array(a) for a in (u, logits, w1, w2)]
    (y,), gradients = mx.vjp(lambda *a: feed_forward(*a, k, padded), inputs, [mx.array(dy)])
    for found, right in zip((y, *gradients), feed_forward_exactly(u, logits, w1, w2, dy, k), strict=True):
        assert np.abs(np.array(found) - right).max() <= 2e-5 * np.abs(right).max()


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_padded_quantised_experts(dtype: mx.Dtype, dialect: str) -> None:
    M, E, k, D = 40, 3, 2, 64
    rng = np.random.default_rng(6)
    logits = rng.standard_normal((M, E)).astype(np.float32)
    u, dy = (mx.array(rng.standard_normal((M, D)), dtype=mx.float32).astype(dtype) for _ in range(2))
    w1, w2 = (
        NF4Stack.of([nf4.quantize(mx.array(rng.standard_normal((64, 64)), dtype=mx.float32)) for _ in range(E)])
        for _ in "12"
    )
    dense = [np.array(w.dequantize()) for w in (w1, w2)]
    (y,), (du,) = mx.vjp(lambda u: feed_forward(u, mx.array(logits), w1, w2, k, True), [u], [dy])
    right_y, right_du, *_ = feed_forward_exactly(
        u.astype(mx.float32), logits, *dense, dy.astype(mx.float32), k
    )  # fmt: skip
    tolerance = 5e-3 if dtype == mx.float16 else 5e-2
    for found, right in ((y, right_y), (du, right_du)):
        assert found.dtype == dtype
        assert np.abs(np.array(found.astype(mx.float32)) - right).max() <= tolerance * np.abs(right).max()


def test_padding_is_for_even_loads_on_a_gpu(dialect: str) -> None:
    even = route(20 * mx.eye(4)[mx.arange(400) % 4] + 9 * mx.eye(4)[mx.arange(1, 401) % 4], 2)
    gpu = dialect in ("fibers", "cuda", "metal")
    assert places(even).capacity == (256 if gpu else 0)
    assert places(route(mx.zeros((40, 16)) - mx.arange(16), 1)).capacity == 0  # all to one of sixteen
    assert places(route(mx.random.normal((1, 4)), 2)).capacity == 0  # decoding


def test_feed_forward_inside_compile(dialect: str) -> None:
    M, E, k = 45, 4, 2
    D = F = 64
    u, logits = mx.random.normal((M, D)), mx.random.normal((M, E))
    w1, w2 = mx.random.normal((E, F, D)), mx.random.normal((E, D, F))
    quantised = [NF4Stack.of([nf4.quantize(e) for e in w]) for w in (w1, w2)]
    for experts in ([w1, w2], quantised):

        def loss(u: mx.array, logits: mx.array, experts=experts) -> mx.array:  # type: ignore[no-untyped-def]
            return feed_forward(u, logits, *experts, k).square().mean()

        both = mx.grad(loss, argnums=(0, 1))
        for eager, compiled in zip(both(u, logits), mx.compile(both)(u, logits), strict=True):
            np.testing.assert_allclose(eager, compiled, rtol=2e-3, atol=1e-5)


def test_feed_forward_repeats_to_the_bit(dialect: str) -> None:
    u, logits = mx.random.normal((50, 16)), mx.random.normal((50, 4))
    w1, w2 = mx.random.normal((4, 24, 16)), mx.random.normal((4, 16, 24))
    gradient = mx.grad(lambda u, logits: feed_forward(u, logits, w1, w2, 2, True).sum(), argnums=(0, 1))
    for a, b in zip(gradient(u, logits), gradient(u, logits), strict=True):
        np.testing.assert_array_equal(a, b)
