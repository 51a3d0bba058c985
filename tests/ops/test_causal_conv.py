"""The convolution's output and every gradient against a float64 loop, in every dialect."""

import numpy as np
import pytest

from magellano.backend import mx
from magellano.ops import host, launch
from magellano.ops.causal_conv import causal_conv


def random_inputs(B: int, T: int, I: int, K: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal
    return {
        "x": normal((B, T, I)),
        "weight": normal((I, K)),
        "bias": normal(I),
        "state": normal((B, K - 1, I)),
        "reset": (rng.random((B, T)) < 0.2).astype(np.uint8),
        "dy": normal((B, T, I)),
        "dstate_out": normal((B, K - 1, I)),
    }


def loop(v: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs and gradients in float64, tap by tap. Absent inputs are zero."""
    v = {name: np.asarray(a, np.float64) for name, a in v.items()}
    x, weight, bias = v["x"], v["weight"], v["bias"]
    (B, T, I), K = x.shape, weight.shape[1]
    reset, state = v.get("reset", np.zeros((B, T))), v.get("state", np.zeros((B, K - 1, I)))
    inputs = np.concatenate([state, x], 1)  # x_t is inputs[t + K - 1]
    # reaches[b, t, m]: the tap m steps back lies in the same document
    reaches = np.array(
        [
            [[not reset[b, max(t - m + 1, 0) : t + 1].any() or m == 0 for m in range(K)] for t in range(T)]
            for b in range(B)
        ]
    )
    p = np.zeros((B, T, I)) + bias
    for m in range(K):
        p += weight[:, K - 1 - m] * inputs[:, K - 1 - m : K - 1 - m + T] * reaches[:, :, m, None]
    sig = 1 / (1 + np.exp(-p))
    h = v["dy"] * sig * (1 + p * (1 - sig))
    dinputs, dweight = np.zeros_like(inputs), np.zeros_like(weight)
    for m in range(K):
        cut = h * reaches[:, :, m, None]
        dinputs[:, K - 1 - m : K - 1 - m + T] += weight[:, K - 1 - m] * cut
        dweight[:, K - 1 - m] = (cut * inputs[:, K - 1 - m : K - 1 - m + T]).sum((0, 1))
    kept = np.ones((B, K - 1, 1))
    for j in range(K - 1):  # the input at time T - (K-1) + j is kept if no reset comes after it
        kept[:, j, 0] = [not reset[b, max(T - (K - 1) + j + 1, 0) :].any() for b in range(B)]
    dinputs[:, T:] += v.get("dstate_out", 0.0) * kept
    return {
        "y": p * sig, "state_out": inputs[:, T:] * kept, "dx": dinputs[:, K - 1 :], "dstate": dinputs[:, : K - 1],
        "dweight": dweight, "dbias": h.sum((0, 1)),
    }  # fmt: skip


def run(v: dict[str, np.ndarray], dtype: mx.Dtype = mx.float32, frozen: bool = False) -> dict[str, np.ndarray]:
    names = [name for name in ("x", "weight", "bias", "state") if name in v]
    reset = mx.array(v["reset"]) if "reset" in v else None

    def call(*args: mx.array) -> tuple[mx.array, ...]:
        given = dict(zip(names, args, strict=True))
        return causal_conv(  # type: ignore[return-value]
            given["x"],
            given["weight"],
            given["bias"],
            reset,
            given.get("state"),
            return_state=True,
            frozen_parameters=frozen,
        )

    arrays = [mx.array(v[name], mx.float32).astype(dtype) for name in names]
    cotangents = [mx.array(v[name], mx.float32).astype(dtype) for name in ("dy", "dstate_out")]
    (y, state_out), grads = mx.vjp(call, arrays, cotangents)
    assert y.dtype == state_out.dtype == dtype
    results = {"y": y, "state_out": state_out, **{f"d{n}": g for n, g in zip(names, grads, strict=True)}}
    return {name: np.array(a.astype(mx.float32)) for name, a in results.items()}


def rounded(v: dict[str, np.ndarray], dtype: mx.Dtype) -> dict[str, np.ndarray]:
    return {
        name: a if name == "reset" else np.array(mx.array(a, mx.float32).astype(dtype).astype(mx.float32))
        for name, a in v.items()
    }


def compare(got: dict[str, np.ndarray], want: dict[str, np.ndarray], tolerance: float) -> None:
    for name, value in got.items():
        assert np.isfinite(value).all(), f"{name} has an element that is not finite, or that nothing wrote"
        error = np.abs(value - want[name]).max() / np.abs(want[name]).max()
        assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance:.0e}"


@pytest.mark.parametrize(("T", "I", "K"), [(1, 64, 4), (2, 8, 4), (7, 67, 4), (64, 130, 4), (67, 3, 2), (130, 24, 3)])
def test_outputs_and_gradients_agree_with_float64(dialect: str, T: int, I: int, K: int) -> None:
    v = rounded(random_inputs(2, T, I, K), mx.float32)
    compare(run(v), loop(v), 2e-6)


@pytest.mark.parametrize("absent", ["reset", "state"])
def test_each_input_may_be_absent(dialect: str, absent: str) -> None:
    v = rounded(random_inputs(2, 70, 32, 4), mx.float32)
    del v[absent]
    compare(run(v), loop(v), 2e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float16, 2e-3), (mx.bfloat16, 1.6e-2)])
def test_16_bit_inputs(dialect: str, dtype: mx.Dtype, tolerance: float) -> None:
    v = rounded(random_inputs(2, 33, 40, 4), dtype)
    compare(run(v, dtype), loop(v), tolerance)


@pytest.mark.parametrize(("I", "first"), [(24, 0), (24, 24), (24, 1), (67, 67)])
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_a_view_gives_what_its_copy_gives(dialect: str, dtype: mx.Dtype, I: int, first: int) -> None:
    """Halves of a projection, those that wide loads cannot reach, and rows that lie across memory."""
    v = {name: mx.array(a, mx.float32) for name, a in random_inputs(2, 21, I, 4).items()}
    joint = mx.random.normal((2, 21, 2 * I + 1), key=mx.random.key(1)).astype(dtype)
    across = mx.random.normal((2, I, 21), key=mx.random.key(2)).astype(dtype)

    def convolve(x: mx.array) -> mx.array:
        y = causal_conv(x, v["weight"], v["bias"], v["reset"])
        assert isinstance(y, mx.array)
        return y

    def work(x: mx.array, dy: mx.array) -> list[mx.array]:
        return [a.astype(mx.float32) for part in mx.vjp(convolve, [x], [dy]) for a in part]

    for x in (joint[:, :, first : first + I], mx.swapaxes(across, 1, 2)):
        for dy in (joint[:, :, I - first : 2 * I - first], mx.swapaxes(across, 1, 2)):
            for got, want in zip(work(x, dy), work(mx.contiguous(x), mx.contiguous(dy)), strict=True):
                assert np.array_equal(np.array(got), np.array(want))


def test_a_view_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    if launch.Dialect.HOST not in launch.available():
        pytest.skip("the host dialect, which shows the strides, cannot run here")
    seen, call = [], host.call
    monkeypatch.setattr(host, "call", lambda *args: seen.append(args[4]) or call(*args))
    joint, weight, bias = mx.ones((2, 5, 48)), mx.ones((24, 4)), mx.ones(24)
    with launch.use("host"):
        mx.eval(mx.grad(lambda a: causal_conv(mx.split(a, 2, axis=-1)[1], weight, bias).sum())(joint))  # type: ignore[union-attr]
    assert [call[0] for call in seen] == [(5 * 48, 48, 1)] * 2  # forward and backward


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_parameters_may_be_of_another_dtype(dialect: str, dtype: mx.Dtype) -> None:
    v = {name: mx.array(a, mx.float32) for name, a in random_inputs(2, 21, 24, 4).items()}
    small = [v[name].astype(dtype) for name in ("weight", "bias")]
    got, want = (causal_conv(v["x"], *p) for p in (small, [a.astype(mx.float32) for a in small]))
    np.testing.assert_allclose(np.array(got), np.array(want), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [mx.bool_, mx.int32, mx.float32])
def test_reset_of_any_dtype(dialect: str, dtype: mx.Dtype) -> None:
    v = {name: mx.array(a) for name, a in random_inputs(2, 21, 24, 4).items()}
    x, weight, bias = (v[name].astype(mx.float32) for name in ("x", "weight", "bias"))
    got, want = (causal_conv(x, weight, bias, r) for r in (v["reset"].astype(dtype), 2 * v["reset"]))
    assert np.array_equal(np.array(got), np.array(want))


def test_packed_documents_are_separate_documents(dialect: str) -> None:
    v = {name: mx.array(a, mx.float32) for name, a in random_inputs(1, 20, 16, 4).items()}
    reset = mx.zeros((1, 20), dtype=mx.uint8)
    reset[0, 0], reset[0, 9], reset[0, 10] = 1, 1, 1
    packed = causal_conv(v["x"], v["weight"], v["bias"], reset)
    for first, last in ((0, 9), (9, 10), (10, 20)):
        alone = causal_conv(v["x"][:, first:last], v["weight"], v["bias"])
        np.testing.assert_allclose(np.array(packed)[:, first:last], np.array(alone), rtol=1e-6, atol=1e-6)


def test_streaming_equals_the_whole(dialect: str) -> None:
    v = {name: mx.array(a, mx.float32) for name, a in random_inputs(2, 21, 24, 4).items()}
    reset = mx.array(random_inputs(2, 21, 24, 4)["reset"])

    def convolve(first: int, last: int, state: mx.array) -> tuple[mx.array, mx.array]:
        part = v["x"][:, first:last], v["weight"], v["bias"], reset[:, first:last]
        return causal_conv(*part, state=state, return_state=True)  # type: ignore[return-value]

    y_whole, state_whole = convolve(0, 21, v["state"])
    ys, state = [], v["state"]
    for first, last in ((0, 1), (1, 2), (2, 4), (4, 13), (13, 21)):
        y, state = convolve(first, last, state)
        ys.append(y)
    np.testing.assert_allclose(np.array(mx.concatenate(ys, axis=1)), np.array(y_whole), rtol=1e-6, atol=1e-6)
    np.testing.assert_array_equal(np.array(state), np.array(state_whole))


def test_frozen_parameters_get_no_gradient_and_change_no_other(kernel_dialect: str) -> None:
    v = random_inputs(2, 21, 64, 4)
    free, frozen = run(v), run(v, frozen=True)
    assert not frozen["dweight"].any()
    assert not frozen["dbias"].any()
    for name in ("y", "state_out", "dx", "dstate"):
        np.testing.assert_allclose(frozen[name], free[name], rtol=1e-6, atol=1e-6, err_msg=name)
    del v["state"]
    np.testing.assert_allclose(run(v, frozen=True)["dx"], run(v)["dx"], rtol=1e-6, atol=1e-6)


def test_same_inputs_give_the_same_bits(kernel_dialect: str) -> None:
    v = random_inputs(2, 140, 96, 4)
    once, again = run(v), run(v)
    for name in once:
        assert once[name].tobytes() == again[name].tobytes(), name


def test_compiles(dialect: str) -> None:
    v = {name: mx.array(a, mx.float32) for name, a in random_inputs(2, 9, 16, 4).items()}
    reset = (v["reset"] != 0).astype(mx.uint8)
    plain = causal_conv(v["x"], v["weight"], v["bias"], reset)
    compiled = mx.compile(lambda x, r: causal_conv(x, v["weight"], v["bias"], r))(v["x"], reset)
    np.testing.assert_allclose(np.array(compiled), np.array(plain), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "shape"), [("x", (2, 4)), ("weight", (7, 4)), ("bias", (9,)), ("reset", (2, 3)), ("state", (2, 4, 8))]
)
def test_a_wrong_shape_is_named(name: str, shape: tuple[int, ...]) -> None:
    shapes = {"x": (2, 4, 8), "weight": (8, 4), "bias": (8,), "reset": (2, 4), "state": (2, 3, 8)} | {name: shape}
    with launch.use("reference"), pytest.raises(ValueError, match=f"causal_conv: {name} has shape"):
        causal_conv(*(mx.zeros(s) for s in shapes.values()))
