"""Gated experts: output and every gradient against MLX's own gradient of the formula, written out for each token."""

import numpy as np
import pytest

from magellano.backend import mx
from magellano.names import Hidden
from magellano.ops import gated
from magellano.ops.experts import Layer, feed_forward
from magellano.ops.moe import Room, places, route

E, D, F, M, K, R = 3, 8, 6, 11, 2, 2
ACT = {
    Hidden.SWIGLU: lambda a: a * mx.sigmoid(a),
    Hidden.GEGLU: lambda a: a * 0.5 * (1 + mx.erf(a / np.sqrt(2))),
}


def arrays(*shapes: tuple[int, ...]) -> list[mx.array]:
    rng = np.random.default_rng(0)
    return [mx.array(rng.normal(0, 0.7, shape).astype(np.float32)) for shape in shapes]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("adapter", [None, "lora", "dora"])
@pytest.mark.parametrize("hidden", list(ACT))
def test_a_mixture_of_them(hidden: Hidden, adapter: str | None, padded: bool):
    u, logits, w1, w2, dy = arrays((M, D), (M, E), (E, 2 * F, D), (E, D, F), (M, D))
    low = arrays((E, R, D), (E, 2 * F, R), (E, 2 * F, 1), (E, R, F), (E, D, R), (E, D, 1))
    routing = route(logits, K)
    at = places(routing, Room.whole(E, M) if padded else None)
    free = [w1, w2] if adapter is None else low if adapter == "dora" else [low[0], low[1], low[3], low[4]]

    def both(free: tuple[mx.array, ...]) -> tuple[tuple[mx.array, ...], tuple[mx.array, ...]]:
        return free[: len(free) // 2], free[len(free) // 2 :]

    def layer(w: mx.array, given: tuple[mx.array, ...]) -> Layer:
        if adapter is None:
            return Layer(*given)
        more = {"m": given[2], "squares": w.square().sum(axis=-1)} if adapter == "dora" else {}
        return Layer(w, *given[:2], 0.5, **more)

    def formula(w: mx.array, given: tuple[mx.array, ...]) -> mx.array:
        if adapter is None:
            return given[0]
        whole = w + 0.5 * given[1] @ given[0]
        if adapter == "lora":
            return whole
        return given[2] * whole / mx.sqrt(mx.stop_gradient(whole).square().sum(axis=-1, keepdims=True))

    def ours(u: mx.array, gate: mx.array, *free: mx.array) -> mx.array:
        layers = map(layer, (w1, w2), both(free))
        return (feed_forward(u, gate, at, *layers, hidden=hidden) * dy).sum()

    def theirs(u: mx.array, gate: mx.array, *free: mx.array) -> mx.array:
        first, second = map(formula, (w1, w2), both(free))
        h = mx.einsum("exd,md->mex", first, u)
        y = mx.einsum("edf,mef->med", second, ACT[hidden](h[..., :F]) * h[..., F:])
        chosen = mx.take_along_axis(y, routing.expert_Mk[..., None], axis=1)
        return ((gate[..., None] * chosen).sum(1) * dy).sum()

    inputs, numbers = [u, routing.gate_Mk, *free], list(range(2 + len(free)))
    got, grads = mx.value_and_grad(ours, numbers)(*inputs)
    right, wanted = mx.value_and_grad(theirs, numbers)(*inputs)
    assert got.item() == pytest.approx(right.item(), rel=1e-4, abs=1e-3)
    for g, w in zip(grads, wanted, strict=True):
        np.testing.assert_allclose(np.array(g), np.array(w), atol=2e-4 * np.abs(np.array(w)).max())


@pytest.mark.parametrize("hidden", list(ACT))
def test_16_bits_are_computed_in_32(hidden: Hidden):
    (h,) = arrays((2, 3, 2 * F))
    got = gated.forward(h.astype(mx.bfloat16), hidden)
    assert got.dtype == mx.bfloat16
    wide = gated.forward(h.astype(mx.bfloat16).astype(mx.float32), hidden)
    assert mx.array_equal(got, wide.astype(mx.bfloat16)).item()
