"""Routing and the grouped product against dense formulas in float64, in every dialect."""

import numpy as np
import pytest

from magellano import nf4
from magellano.backend import mx, on_gpu
from magellano.nf4 import NF4Stack
from magellano.ops import experts as operations
from magellano.ops.experts import Layer
from magellano.ops.moe import Room, places, route

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


def loaded(sizes: list[int]) -> mx.array:
    """Logits that send so many tokens to each expert."""
    expert = np.random.default_rng(3).permutation(np.repeat(np.arange(len(sizes)), sizes))
    return mx.array(30 * np.eye(len(sizes), dtype=np.float32)[expert])


@pytest.mark.parametrize("quantised", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("case", SIZES)
def test_any_load(case: str, padded: bool, quantised: bool, dialect: str) -> None:
    """The product with each token's one expert, and its gradients, for loads with empty experts too."""
    rng, logits = np.random.default_rng(7), loaded(SIZES[case])
    u, dy = (rng.standard_normal((20, 64)).astype(np.float32) for _ in range(2))
    w1, w2 = (rng.standard_normal((4, 64, 64)).astype(np.float32) for _ in range(2))
    layers = [mx.array(w1), mx.array(w2)]
    if quantised:
        layers = [NF4Stack.of([nf4.quantize(mx.array(e)) for e in w]) for w in (w1, w2)]
        w1, w2 = (np.array(w.dequantize()) for w in layers)
    inputs = [mx.array(u), *([] if quantised else layers)]
    (y,), found = mx.vjp(
        lambda u, *w: feed_forward(u, logits, *(w or layers), 1, padded), inputs, [mx.array(dy)]
    )  # fmt: skip
    right_y, du, _, dw1, dw2 = feed_forward_exactly(u, logits, w1, w2, dy, 1)
    for name, value, right in zip(("y", "u", "w1", "w2"), (y, *found), (right_y, du, dw1, dw2), strict=False):
        assert np.abs(np.array(value) - right).max() <= 2e-5 * np.abs(right).max(), name


@pytest.mark.parametrize("padded", [False, True])
def test_adapters_on_both_layers(padded: bool, dialect: str) -> None:
    M, E, k, D, F, r = 45, 4, 2, 16, 24, 3
    rng = np.random.default_rng(9)
    shapes = {"u": (M, D), "logits": (M, E), "a1": (E, r, D), "b1": (E, F, r), "a2": (E, r, F), "b2": (E, D, r)}
    given = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    w1, w2 = (rng.standard_normal(s).astype(np.float32) for s in ((E, F, D), (E, D, F)))
    dy, scale = rng.standard_normal((M, D)).astype(np.float32), 0.5

    def mixture(u, logits, a1, b1, a2, b2):  # type: ignore[no-untyped-def]
        layers = Layer(mx.array(w1), a1, b1, scale), Layer(mx.array(w2), a2, b2, scale)
        routing = route(logits, k)
        return operations.feed_forward(u, routing.gate_Mk, places(routing, room_for(routing, padded)), *layers)

    (y,), found = mx.vjp(mixture, [mx.array(a) for a in given.values()], [mx.array(dy)])
    a1, b1, a2, b2 = (given[name].astype(np.float64) for name in ("a1", "b1", "a2", "b2"))
    right_y, du, dlogits, dw1, dw2 = feed_forward_exactly(
        given["u"], given["logits"], w1 + scale * b1 @ a1, w2 + scale * b2 @ a2, dy, k
    )
    right = [du, dlogits, scale * b1.swapaxes(1, 2) @ dw1, scale * dw1 @ a1.swapaxes(1, 2)]
    right += [scale * b2.swapaxes(1, 2) @ dw2, scale * dw2 @ a2.swapaxes(1, 2)]
    for name, value, want in zip(("y", *shapes), (y, *found), (right_y, *right), strict=True):
        assert np.abs(np.array(value) - want).max() <= 2e-5 * np.abs(want).max(), name


@pytest.mark.parametrize(
    ("padded", "ordered", "unread"), [(False, False, False), (True, False, False), (True, True, True)]
)
def test_rows_with_lengths_of_their_own(padded: bool, ordered: bool, unread: bool, dialect: str) -> None:
    """DoRA on both layers, weights frozen in NF4, what trains in the room's order: m W' / |W'|, |W'| held fixed."""
    M, E, k, D, r, scale = 45, 4, 2, 64, 3, 0.5
    rng = np.random.default_rng(11)
    each = {"a": (E, r, D), "b": (E, D, r), "m": (E, D, 1)}
    given = {f"{part}{n}": rng.standard_normal(shape).astype(np.float32) for n in "12" for part, shape in each.items()}
    u, dy = (rng.standard_normal((M, D)).astype(np.float32) for _ in range(2))
    logits = rng.standard_normal((M, E)).astype(np.float32) + np.array([0.0, 2.0, -1.0, 1.0], np.float32)
    stacks = [NF4Stack.of([nf4.quantize(w) for w in mx.random.normal((E, D, D), key=mx.random.key(n))]) for n in (1, 2)]
    routing = route(mx.array(logits), k)
    room = room_for(routing, padded)
    order = list(room.order) if ordered else list(range(E))
    squares = [stack.dequantize().square().sum(axis=-1) for stack in stacks]

    def mixture(u, logits, *arrays):  # type: ignore[no-untyped-def]
        layers = [
            Layer(w, *arrays[3 * n : 3 * n + 2], scale, ordered, arrays[3 * n + 2], squares[n])
            for n, w in enumerate(stacks)
        ]
        routing = route(logits, k)
        return operations.feed_forward(u, routing.gate_Mk, places(routing, room), *layers, unread=unread)

    inputs = [mx.array(u), mx.array(logits), *(mx.array(value[order]) for value in given.values())]
    (y,), found = mx.vjp(mixture, inputs, [mx.array(dy)])
    whole, norms, weights = [], [], []
    for n, w in zip("12", (np.array(stack.dequantize(), np.float64) for stack in stacks), strict=True):
        whole.append(w + scale * given[f"b{n}"].astype(np.float64) @ given[f"a{n}"])
        norms.append(np.linalg.norm(whole[-1], axis=-1, keepdims=True))
        weights.append(given[f"m{n}"] * whole[-1] / norms[-1])
    right_y, du, dlogits, *dw = feed_forward_exactly(u, logits, *weights, dy, k)
    wanted = {"u": du, "logits": dlogits}
    for n, d, v, norm in zip("12", dw, whole, norms, strict=True):
        through = d * given[f"m{n}"] / norm
        wanted[f"a{n}"] = scale * given[f"b{n}"].swapaxes(1, 2) @ through
        wanted[f"b{n}"] = scale * through @ given[f"a{n}"].swapaxes(1, 2)
        wanted[f"m{n}"] = (d * v).sum(axis=-1, keepdims=True) / norm
    for (name, want), value in zip(wanted.items(), found, strict=True):
        want = want if name in ("u", "logits") else want[order]
        assert np.abs(np.array(value) - want).max() <= 3e-5 * np.abs(want).max(), name
    if not unread:
        assert np.abs(np.array(y) - right_y).max() <= 2e-5 * np.abs(right_y).max()


@pytest.mark.parametrize("quantised", [False, True])
def test_unread_outputs_change_no_gradient(quantised: bool, dialect: str) -> None:
    u, logits, dy = (mx.random.normal(s) for s in ((30, 64), (30, 4), (30, 64)))
    layers = Layer(mx.random.normal((4, 128, 64))), Layer(mx.random.normal((4, 64, 128)))
    if quantised:
        a, b = mx.random.normal((4, 3, 64)), mx.random.normal((4, 128, 3))
        w1, w2 = (NF4Stack.of([nf4.quantize(e) for e in layer.weight]) for layer in layers)
        layers = Layer(w1, a, b, 0.5), Layer(w2)

    def mixture(u: mx.array, logits: mx.array, unread: bool) -> mx.array:
        routing = route(logits, 2)
        return operations.feed_forward(u, routing.gate_Mk, places(routing), *layers, unread=unread)

    for a, b in zip(
        *(mx.vjp(lambda *x, u=unread: mixture(*x, u), [u, logits], [dy])[1] for unread in (False, True)), strict=True
    ):
        np.testing.assert_array_equal(a, b)


def test_only_one_expert_is_dense_at_a_time(dialect: str) -> None:
    if on_gpu() or dialect not in ("reference", "host"):
        pytest.skip("a GPU makes all dense in one launch, and frees nothing before a batch of launches is done")
    E, D = 8, 512
    layers = [Layer(NF4Stack.of([nf4.quantize(mx.random.normal((D, D))) for _ in range(E)])) for _ in range(2)]
    mx.eval([vars(t.parts) for layer in layers for t in layer.weight.tensors])
    u, logits = mx.random.normal((E * 4, D)), loaded([4] * E)
    mx.eval(u, logits)

    def loss(u: mx.array) -> mx.array:
        routing = route(logits, 1)
        return operations.feed_forward(u, routing.gate_Mk, places(routing), *layers).sum()

    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.grad(loss)(u))
    # The plain form of the dequantisation has temporaries of about twice the matrix; all experts would be eight.
    assert mx.get_peak_memory() - before < 4.5 * (D * D * 4)


def test_a_gradient_of_the_weights_costs_one_stack() -> None:
    # A GPU pads rows and frees nothing before a batch of launches is done: there the experts must be large beside that.
    (E, D), most = ((8, 2048), 4.0) if on_gpu() else ((8, 256), 2.5)
    u, w, fixed, logits = mx.random.normal((E * 4, D)), *mx.random.normal((2, E, D, D)), loaded([4] * E)
    mx.eval(u, w, fixed, logits)

    def loss(w: mx.array) -> mx.array:
        routing = route(logits, 1)
        return operations.feed_forward(u, routing.gate_Mk, places(routing), Layer(w), Layer(fixed)).sum()

    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.grad(loss)(w))
    assert mx.get_peak_memory() - before < most * w.nbytes  # the parts and their stack; by MLX's own gradient over 8


def test_inside_checkpoint(dialect: str) -> None:
    u, logits = mx.random.normal((20, 64)), loaded(SIZES["uneven"])
    layers = [NF4Stack.of([nf4.quantize(e) for e in mx.random.normal((4, 64, 64))]) for _ in range(2)]

    def loss(u: mx.array) -> mx.array:
        return feed_forward(u, logits, *layers, 1).square().sum()

    plain, checkpointed = mx.grad(loss)(u), mx.grad(mx.checkpoint(loss))(u)
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


def room_for(routing, padded):  # type: ignore[no-untyped-def]
    """A padded or an exact room; None for `padded` None."""
    if padded is None:
        return None
    loads = np.array(routing.size_E).tolist()
    return Room.padded(loads, routing.expert_Mk.shape[0]) if padded else Room.exact(loads)


def feed_forward(u, logits, w1, w2, k, padded=None):  # type: ignore[no-untyped-def]
    routing = route(logits, k)
    at = places(routing, room_for(routing, padded))
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


def test_rooms() -> None:
    """Experts with like loads share a part, with a fifth to spare, and never more rows than there are tokens; no part
    has more than a third of the experts.
    """
    even = Room.padded([500, 512, 480, 510], 2048)
    assert sorted(len(experts) for experts, _ in even.parts) == [1, 1, 2]
    assert {rows for _, rows in even.parts} == {512}
    spare = Room.padded([500, 512, 480, 510], 2048, spare=True)
    assert {rows for _, rows in spare.parts} == {576, 640}
    uneven = Room.padded([1900, 100, 2048, 90, 0, 105], 2048, spare=True)
    assert uneven.parts == (((0, 2), 2048), ((1, 5), 128), ((3, 4), 128))
    start, size = uneven.of_each()
    assert start == [0, 4096, 2048, 4352, 4480, 4224]
    assert size == [2048, 128, 2048, 128, 128, 128]
    assert uneven.rows == 4608
    assert max(len(experts) for experts, _ in Room.padded([90, 80, 70, 60, 50, 40, 30, 20], 128).parts) == 3
    assert Room.padded([7], 128).parts == (((0,), 64),)
    assert uneven.holds([2048, 128, 0, 0, 0, 128])
    assert not uneven.holds([2048, 129, 0, 0, 0, 128])
    assert Room.exact([3, 0, 2]).parts == (((0,), 3), ((2,), 2))
    assert Room.whole(3, 7).rows == 21


def test_a_room_that_is_too_small_reads_and_writes_inside_itself(dialect: str) -> None:
    """What comes out is void, but nothing lies outside, so that a caller may look at the loads afterwards."""
    routing = route(loaded([0, 19, 0, 1]), 1)
    at = places(routing, Room.padded([4, 4, 4, 4], 4))
    assert at.copy_N.shape == (16,)
    assert 0 <= np.array(at.row_Mk).min() <= np.array(at.row_Mk).max() < 16
    assert np.array(at.copy_N).max() < 20


def test_on_a_gpu_rows_are_padded(dialect: str) -> None:
    room = places(route(20 * mx.eye(4)[mx.arange(400) % 4] + 9 * mx.eye(4)[mx.arange(1, 401) % 4], 2)).room
    gpu = dialect in ("fibers", "cuda", "metal")
    assert room == (Room.padded([200] * 4, 400) if gpu else Room.exact([200] * 4))


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
