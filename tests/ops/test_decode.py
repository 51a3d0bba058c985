"""The operations of a decoding step against float64 loops and against the operations that they stand for."""

import numpy as np
import pytest

from magellano import nf4
from magellano.backend import mx
from magellano.nf4 import NF4Tensor
from magellano.ops.around import Around
from magellano.ops.causal_conv import causal_conv
from magellano.ops.decode import conv_step, matvec, nf4_rows
from magellano.ops.experts import Layer, feed_forward, feed_forward_few
from magellano.ops.moe import places, route
from magellano.ops.nf4 import nf4_matvec

TOLERANCE = {mx.float32: 3e-6, mx.bfloat16: 8e-3}


def drawn(rng: np.random.Generator, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.array(rng.standard_normal(shape)).astype(dtype)


def wide(a: mx.array) -> np.ndarray:
    return np.array(a.astype(mx.float32), np.float64)


def matrix(
    rng: np.random.Generator, shape: tuple[int, ...], packed: bool
) -> tuple[mx.array | nf4.NF4Stack, np.ndarray]:
    """Dense or NF4, and what it means."""
    w = drawn(rng, *shape)
    if not packed:
        return w, wide(w)
    made = nf4.NF4Stack.of([nf4.quantize(x) for x in w.reshape(-1, *shape[-2:])])
    return made, wide(made.dequantize()).reshape(shape)


def product(
    x: mx.array, w: mx.array | nf4.NF4Stack, expert: mx.array | None, around: Around, out: mx.Dtype
) -> mx.array:
    if isinstance(w, mx.array):
        return matvec(x, w, expert, around, out)
    parts = w.parts if expert is not None else w[0].parts
    return nf4_matvec(x, parts, w.shape[1], expert, around, out)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 64, 5), (1, 1024, 33), (3, 320, 70), (6, 192, 16)])
def test_everything_around_a_product(
    rows: int, inputs: int, outputs: int, dtype: mx.Dtype, packed: bool, dialect: str
) -> None:
    rng = np.random.default_rng(rows + inputs)
    w, dense = matrix(rng, (outputs, inputs), packed)
    x, norm, a, b = (
        drawn(rng, rows, inputs, dtype=dtype),
        *(drawn(rng, *s) for s in ((inputs,), (7, inputs), (outputs, 7))),
    )
    residual = drawn(rng, rows, outputs, dtype=dtype)
    low = matvec(x, a, None, Around(norm, 0.25), mx.float32)
    normed = wide(x) / np.sqrt((wide(x) ** 2).mean(1, keepdims=True) + 0.25) * wide(norm)
    assert np.abs(wide(low) - normed @ wide(a).T).max() <= 3e-6 * np.abs(normed @ wide(a).T).max()
    around = Around(norm, 0.25, low, b, 0.5, relu=True, residual_MO=residual)
    want = np.maximum(normed @ dense.T + 0.5 * normed @ wide(a).T @ wide(b).T, 0) + wide(residual)
    got = product(x, w, None, around, dtype)
    assert got.dtype == dtype
    assert np.abs(wide(got) - want).max() <= TOLERANCE[dtype] * np.abs(want).max()
    plainly = product(x, w, None, Around(), mx.float32)
    assert np.abs(wide(plainly) - wide(x) @ dense.T).max() <= 3e-6 * np.abs(wide(x) @ dense.T).max()


@pytest.mark.parametrize("packed", [False, True])
def test_a_row_serves_the_experts_that_it_was_given_to(packed: bool, dialect: str) -> None:
    rng = np.random.default_rng(4)
    w, dense = matrix(rng, (3, 40, 128), packed)
    x, a, b, expert = drawn(rng, 2, 128), drawn(rng, 3, 5, 128), drawn(rng, 3, 40, 5), [2, 0, 1, 2]
    low = matvec(x, a, mx.array(expert), None, mx.float32)
    got = wide(product(x, w, mx.array(expert), Around(low_Mr=low, b=b, scale=2.0), mx.float32))
    for m, e in enumerate(expert):
        row = wide(x)[m // 2]
        want = dense[e] @ row + 2 * wide(b)[e] @ (wide(a)[e] @ row)
        assert np.abs(got[m] - want).max() <= 3e-6 * np.abs(want).max(), f"row {m}"


def test_rows_that_cannot_be_shared_out_are_refused() -> None:
    stack = nf4.NF4Stack.of([nf4.quantize(mx.ones((8, 64)))] * 2)
    with pytest.raises(ValueError, match="3 rows cannot come from 2"):
        nf4_matvec(mx.ones((2, 64)), stack.parts, 8, mx.array([0, 1, 1]))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize(("channels", "taps"), [(70, 4), (8, 2), (5, 1)])
@pytest.mark.parametrize("streams", [1, 2])
def test_a_convolution_step_is_the_convolution(
    channels: int, taps: int, streams: int, dtype: mx.Dtype, dialect: str
) -> None:
    rng = np.random.default_rng(taps)
    x = drawn(rng, 2, 6, streams * channels, dtype=dtype)
    weight, bias = drawn(rng, channels, taps), drawn(rng, channels)
    state = drawn(rng, 2, taps - 1, channels, dtype=dtype)
    want, last = causal_conv(x[..., :channels], weight, bias, None, state, return_state=True)
    for t in range(6):
        y, state = conv_step(x[:, t], weight, bias, state)
        assert np.abs(wide(y) - wide(want[:, t])).max() <= TOLERANCE[dtype] * np.abs(wide(want)).max(), f"step {t}"
    assert state.dtype == dtype
    np.testing.assert_array_equal(wide(state), wide(last))


@pytest.mark.parametrize("shape", [(300, 64), (90, 448)])
@pytest.mark.parametrize("adapted", [False, True])
def test_rows_by_number(shape: tuple[int, int], adapted: bool, dialect: str) -> None:
    rng = np.random.default_rng(6)
    q: NF4Tensor = nf4.quantize(drawn(rng, *shape))
    number = [shape[0] - 1, 0, 17, 17]
    a, b = drawn(rng, 3, shape[1]), drawn(rng, shape[0], 3)
    adapter = (a, b, 0.5) if adapted else ()
    want = wide(q.dequantize())[number] + (0.5 * wide(b)[number] @ wide(a) if adapted else 0)
    got = nf4_rows(mx.array(number), q.parts, shape[1], mx.float32, *adapter)
    np.testing.assert_allclose(wide(got), want, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_the_mixture_for_few_rows_is_the_mixture(packed: bool, adapted: bool, dialect: str) -> None:
    rng = np.random.default_rng(7)
    h, norm, logits = drawn(rng, 3, 64), drawn(rng, 64), drawn(rng, 3, 4)
    layers = []
    for O, I in ((128, 64), (64, 128)):
        adapter = (drawn(rng, 4, 5, I), drawn(rng, 4, O, 5), 0.5) if adapted else ()
        layers.append(Layer(matrix(rng, (4, O, I), packed)[0], *adapter))
    assert all(layer.takes_each for layer in layers)
    routing = route(logits, 2)
    got = feed_forward_few(h, Around(norm, 1e-5), routing.gate_Mk, routing.expert_Mk, *layers)
    want = h + feed_forward(mx.fast.rms_norm(h, norm, 1e-5), routing.gate_Mk, places(routing), *layers)
    assert np.abs(wide(got) - wide(want)).max() <= 1e-5 * np.abs(wide(want)).max()
