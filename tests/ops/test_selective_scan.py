"""The scan's outputs and every gradient against a float64 loop, in every dialect."""

import sys
from typing import Any

import numpy as np
import pytest

from magellano.backend import mx
from magellano.ops import host, launch
from magellano.ops.selective_scan import Geometry, selective_scan

PLAIN = ("x", "dt", "A", "b", "c")
ALL = (*PLAIN, "skip", "z", "dt_bias", "state")


def random_inputs(B: int, T: int, I: int, N: int, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal
    return {
        "x": normal((B, T, I)),
        "dt": 0.5 * normal((B, T, I)),
        "A": -np.exp(np.log(np.arange(1, N + 1))[None] + 0.1 * normal((I, N))),
        "b": normal((B, T, N)),
        "c": normal((B, T, N)),
        "skip": 1 + 0.1 * normal(I),
        "z": normal((B, T, I)),
        "dt_bias": normal(I) - 1,
        "state": normal((B, I, N)),
        "reset": (rng.random((B, T)) < 0.15).astype(np.uint8),
        "dy": normal((B, T, I)),
        "dstate_out": normal((B, I, N)),
    }


def loop(v: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs and gradients in float64, from the equations with every step stored. Absent inputs are neutral."""
    v = {name: np.asarray(a, np.float64) for name, a in v.items()}
    x, A, b, c, dy = (v[name] for name in ("x", "A", "b", "c", "dy"))
    (B, T, I), N = x.shape, A.shape[1]
    reset, skip = v.get("reset", np.zeros((B, T))), v.get("skip", np.zeros(I))
    raw = v["dt"] + v.get("dt_bias", 0.0)
    d, slope = (np.logaddexp(raw, 0), 1 / (1 + np.exp(-raw))) if "dt_bias" in v else (raw, 1.0)
    before, after, s = [], [], v.get("state", np.zeros((B, I, N)))
    for t in range(T):
        s = np.where(reset[:, t, None, None] != 0, 0.0, s)
        before.append(s)
        s = np.exp(d[:, t, :, None] * A) * s + (d[:, t] * x[:, t])[..., None] * b[:, t, None]
        after.append(s)
    p = np.stack([(s_t * c[:, t, None]).sum(-1) for t, s_t in enumerate(after)], 1) + skip * x
    z = v.get("z")
    sig = 1 / (1 + np.exp(-z)) if z is not None else None
    out = {"y": p if z is None else p * z * sig, "state_out": s}
    h = dy if z is None else dy * z * sig
    grads = {
        "x": skip * h,
        "b": np.zeros_like(b),
        "c": np.zeros_like(c),
        "A": np.zeros_like(A),
        "skip": (h * x).sum((0, 1)),
    }
    if z is not None:
        grads["z"] = dy * p * sig * (1 + z * (1 - sig))
    dd, g = np.zeros_like(x), v.get("dstate_out", np.zeros((B, I, N)))
    for t in reversed(range(T)):
        g = g + h[:, t, :, None] * c[:, t, None]
        grads["c"][:, t] = (h[:, t, :, None] * after[t]).sum(1)
        grads["b"][:, t] = (g * (d[:, t] * x[:, t])[..., None]).sum(1)
        gb = (g * b[:, t, None]).sum(-1)
        decay = np.exp(d[:, t, :, None] * A)
        u = decay * before[t]
        grads["x"][:, t] += gb * d[:, t]
        dd[:, t] = gb * x[:, t] + (g * u * A).sum(-1)
        grads["A"] += (g * u * d[:, t, :, None]).sum(0)
        g = np.where(reset[:, t, None, None] != 0, 0.0, decay * g)
    grads |= {"dt": dd * slope, "dt_bias": (dd * slope).sum((0, 1)), "state": g}
    return out | {f"d{name}": grad for name, grad in grads.items()}


def run(v: dict[str, np.ndarray], dtype: mx.Dtype = mx.float32, **options: Any) -> dict[str, np.ndarray]:
    """The operation's outputs and gradients on the same values; per-token inputs in `dtype`, parameters in float32."""
    names = [name for name in ALL if name in v]
    arrays = [to_mlx(name, v[name], dtype) for name in names]
    reset = mx.array(v["reset"]) if "reset" in v else None

    def call(*args: mx.array) -> tuple[mx.array, ...]:
        given = dict(zip(names, args, strict=True))
        plain = [given.pop(name) for name in PLAIN]
        return selective_scan(*plain, reset=reset, return_state=True, **given, **options)  # type: ignore

    dstate_out = v.get("dstate_out", np.zeros((v["x"].shape[0], *v["A"].shape)))
    (y, state_out), grads = mx.vjp(call, arrays, [mx.array(v["dy"]).astype(dtype), mx.array(dstate_out, mx.float32)])
    results = {"y": y, "state_out": state_out, **{f"d{n}": g for n, g in zip(names, grads, strict=True)}}
    assert y.dtype == dtype
    assert state_out.dtype == mx.float32
    assert all(g.dtype == a.dtype and g.shape == a.shape for g, a in zip(grads, arrays, strict=True))
    return {name: np.array(a.astype(mx.float32)) for name, a in results.items()}


def to_mlx(name: str, value: np.ndarray, dtype: mx.Dtype) -> mx.array:
    return mx.array(value, mx.float32).astype(dtype if name in ("x", "dt", "b", "c", "z") else mx.float32)


def rounded(v: dict[str, np.ndarray], dtype: mx.Dtype) -> dict[str, np.ndarray]:
    """The values as the operation sees them, so that the loop starts from the same numbers."""
    per_token = ("x", "dt", "b", "c", "z", "dy")
    return {
        name: np.array(mx.array(a, mx.float32).astype(dtype if name in per_token else mx.float32).astype(mx.float32))
        if name != "reset" else a
        for name, a in v.items()
    }  # fmt: skip


def compare(got: dict[str, np.ndarray], want: dict[str, np.ndarray], tolerance: float) -> None:
    for name, value in got.items():
        assert np.isfinite(value).all(), f"{name} has an element that is not finite, or that nothing wrote"
        error = np.abs(value - want[name]).max() / max(np.abs(want[name]).max(), 1e-30)
        assert error <= tolerance, f"{name}: relative error {error:.1e} > {tolerance:.0e}"


@pytest.mark.parametrize(("T", "I", "N"), [(1, 64, 16), (7, 24, 16), (64, 67, 8), (67, 130, 16), (33, 8, 5), (3, 1, 1)])
def test_outputs_and_gradients_agree_with_float64(dialect: str, T: int, I: int, N: int) -> None:
    v = rounded(random_inputs(2, T, I, N), mx.float32)
    compare(run(v), loop(v), 2e-6)


def test_long_sequence(dialect: str) -> None:
    if dialect == "reference":
        pytest.skip("the reference steps one token at a time")
    v = rounded(random_inputs(1, 513, 16, 16), mx.float32)
    compare(run(v), loop(v), 3e-6)


@pytest.mark.parametrize("absent", ["skip", "z", "dt_bias", "state", "reset"])
def test_each_input_may_be_absent(dialect: str, absent: str) -> None:
    v = rounded(random_inputs(2, 19, 32, 4), mx.float32)
    del v[absent]
    if absent == "dt_bias":
        v["dt"] = np.abs(v["dt"])  # then dt is the step itself
    compare(run(v), loop(v), 2e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float16, 2e-3), (mx.bfloat16, 1.6e-2)])
def test_16_bit_inputs(dialect: str, dtype: mx.Dtype, tolerance: float) -> None:
    v = rounded(random_inputs(2, 19, 40, 16), dtype)
    compare(run(v, dtype), loop(v), tolerance)


def test_16_bit_inputs_without_a_gate(dialect: str) -> None:
    v = rounded(random_inputs(1, 19, 40, 16), mx.float16)
    del v["z"]
    compare(run(v, mx.float16), loop(v), 2e-3)


def test_extreme_steps(dialect: str) -> None:
    v = random_inputs(1, 20, 64, 16)
    v["dt"][:, ::3] = -40.0  # softplus near 0: the state stays
    v["dt"][:, 1::3] = 60.0  # the state is forgotten
    v = rounded(v, mx.float32)
    compare(run(v), loop(v), 3e-6)


def test_packed_documents_are_separate_documents(dialect: str) -> None:
    v = random_inputs(1, 30, 48, 16)
    del v["state"]
    v["reset"] = np.zeros((1, 30), np.uint8)
    v["reset"][0, [0, 11, 12]] = 1
    packed = run(v)
    for first, last in ((0, 11), (11, 12), (12, 30)):
        alone = {
            name: a[:, first:last] if name in ("x", "dt", "b", "c", "z", "dy", "reset") else a for name, a in v.items()
        }
        if last < 30:
            del alone["dstate_out"]
        separate = run(alone)
        for name in ("y", "dx", "ddt", "dz", "db", "dc"):
            np.testing.assert_allclose(packed[name][:, first:last], separate[name], rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("N", [5, 16])
def test_views_give_what_their_copies_give(dialect: str, N: int) -> None:
    """z as half of a projection, b and c as parts of another, and rows that lie across memory, dy's too."""
    v = {name: mx.array(a, mx.float32) for name, a in random_inputs(2, 21, 24, N).items()}
    names = ("x", "dt", "z", "b", "c")
    z = mx.concatenate([v["x"], v["z"]], axis=2)[:, :, 24:]
    b, c = mx.split(mx.concatenate([v["x"][:, :, :3], v["b"], v["c"]], axis=2), [3, 3 + N], axis=2)[1:]
    across = [mx.swapaxes(mx.contiguous(mx.swapaxes(v[name], 1, 2)), 1, 2) for name in names]

    def work(*views: mx.array, turned: bool = False) -> list[mx.array]:
        def scan(x: mx.array, dt: mx.array, z: mx.array, b: mx.array, c: mx.array) -> mx.array:
            y = selective_scan(x, dt, v["A"], b, c, v["skip"], z, v["dt_bias"], v["reset"])
            assert isinstance(y, mx.array)
            return mx.swapaxes(y, 1, 2) if turned else y

        dy = mx.contiguous(mx.swapaxes(v["dy"], 1, 2)) if turned else v["dy"]
        outputs, grads = mx.vjp(scan, list(views), [dy])
        return [mx.swapaxes(outputs[0], 1, 2) if turned else outputs[0], *grads]

    want = work(*[v[name] for name in names])
    for got in (work(v["x"], v["dt"], z, b, c), work(*across, turned=True)):
        for one, other in zip(got, want, strict=True):
            assert np.array_equal(np.array(one), np.array(other))


def test_views_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    if launch.Dialect.HOST not in launch.available():
        pytest.skip("the host dialect, which shows the strides, cannot run here")
    seen, call = [], host.call
    monkeypatch.setattr(host, "call", lambda *args: seen.append(args[4]) or call(*args))
    v = {name: mx.array(a, mx.float32) for name, a in random_inputs(2, 5, 24, 16).items()}
    joint, maps = mx.ones((2, 5, 48)), mx.ones((2, 5, 35))

    def loss(joint: mx.array, maps: mx.array) -> mx.array:
        _, b, c = mx.split(maps, [3, 19], axis=-1)
        return selective_scan(v["x"], v["dt"], v["A"], b, c, z=mx.split(joint, 2, axis=-1)[1]).sum()  # type: ignore[union-attr]

    with launch.use("host"):
        mx.eval(mx.grad(loss, argnums=(0, 1))(joint, maps))
    assert [call[2:5] for call in seen] == [[(175, 35, 1), (175, 35, 1), (240, 48, 1)]] * 2  # b, c, z; both ways


@pytest.mark.parametrize("N", [5, 16])
def test_A_may_be_given_as_a_logarithm(dialect: str, N: int) -> None:
    v = {name: mx.array(a, mx.float32) for name, a in random_inputs(2, 19, 24, N).items()}
    log_A = mx.log(-v["A"])

    def loss(a: mx.array, log: bool) -> mx.array:
        A = a if log else -mx.exp(a)
        y = selective_scan(v["x"], v["dt"], A, v["b"], v["c"], dt_bias=v["dt_bias"], log_A=log)
        assert isinstance(y, mx.array)
        return (y * v["dy"]).sum()

    (got, d_got), (want, d_want) = (mx.value_and_grad(loss)(log_A, log) for log in (True, False))
    assert abs(got.item() / want.item() - 1) < 1e-5
    np.testing.assert_allclose(np.array(d_got), np.array(d_want), rtol=1e-4, atol=1e-5 * float(mx.abs(d_want).max()))


def test_16_bit_parameters_get_16_bit_gradients(dialect: str) -> None:
    v = {name: mx.array(a, mx.float32) for name, a in random_inputs(2, 19, 24, 16).items()}
    small = [v[name].astype(mx.bfloat16) for name in ("A", "skip", "dt_bias")]

    def loss(A: mx.array, skip: mx.array, dt_bias: mx.array) -> mx.array:
        y = selective_scan(v["x"], v["dt"], A, v["b"], v["c"], skip, dt_bias=dt_bias)
        assert isinstance(y, mx.array)
        return (y * v["dy"]).sum()

    work = mx.value_and_grad(loss, argnums=(0, 1, 2))
    (got, grads), (want, want_grads) = work(*small), work(*[a.astype(mx.float32) for a in small])
    assert abs(got.item() / want.item() - 1) < 1e-5
    for a, b in zip(grads, want_grads, strict=True):
        assert a.dtype == mx.bfloat16
        assert float(mx.abs(a.astype(mx.float32) - b).max() / mx.abs(b).max()) < 5e-3


def test_streaming_equals_the_whole(dialect: str) -> None:
    v = {name: mx.array(a, mx.float32) for name, a in random_inputs(2, 21, 24, 16).items()}
    plain = ("x", "dt", "b", "c", "z")

    def scan(first: int, last: int, state: mx.array) -> tuple[mx.array, mx.array]:
        x, dt, b, c, z = (v[name][:, first:last] for name in plain)
        out = selective_scan(x, dt, v["A"], b, c, v["skip"], z, v["dt_bias"], state=state, return_state=True)
        assert isinstance(out, tuple)
        return out

    y_whole, state_whole = scan(0, 21, v["state"])
    ys, state = [], v["state"]
    for first, last in ((0, 1), (1, 2), (2, 13), (13, 21)):
        y, state = scan(first, last, state)
        ys.append(y)
    np.testing.assert_allclose(np.array(mx.concatenate(ys, axis=1)), np.array(y_whole), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.array(state), np.array(state_whole), rtol=1e-5, atol=1e-6)


def test_same_inputs_give_the_same_bits(kernel_dialect: str) -> None:
    v = random_inputs(2, 40, 192, 16)
    once, again = run(v), run(v)
    for name in once:
        assert once[name].tobytes() == again[name].tobytes(), name


@pytest.mark.parametrize(
    ("lanes", "simdgroups", "steps", "segments"),
    [(1, 1, 4, 1), (2, 2, 8, 3), (4, 2, 16, 2), (8, 8, 8, 1), (16, 4, 16, 5), (4, 1, 4, 4)],
)
def test_every_gpu_geometry_agrees_with_float64(
    kernel_dialect: str,
    monkeypatch: pytest.MonkeyPatch,
    lanes: int,
    simdgroups: int,
    steps: int,
    segments: int,
) -> None:
    if kernel_dialect == "host":
        pytest.skip("the host has a geometry of its own")
    chosen = Geometry(lanes, channels=1, simdgroups=simdgroups, steps=steps, simd=32, segments=segments)
    used = []
    monkeypatch.setattr(
        sys.modules[Geometry.__module__], "geometry", lambda *sizes: used.append(sizes) or (chosen, chosen)
    )
    v = rounded(random_inputs(2, 35, 43, 16), mx.float32)
    compare(run(v), loop(v), 2e-6)
    assert used


def test_frozen_parameters_get_no_gradient_and_change_no_other(kernel_dialect: str) -> None:
    v = random_inputs(2, 21, 64, 16)
    free, frozen = run(v), run(v, frozen_parameters=True)
    for name in free:
        if name in ("dA", "dskip", "ddt_bias"):
            assert not frozen[name].any(), name
        else:
            np.testing.assert_allclose(frozen[name], free[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_checkpointing_gives_the_same_gradient(kernel_dialect: str) -> None:
    v = {name: mx.array(a, mx.float32) for name, a in random_inputs(1, 17, 64, 16).items()}

    def loss(x: mx.array, dt: mx.array) -> mx.array:
        y = selective_scan(x, dt, v["A"], v["b"], v["c"], v["skip"], v["z"], v["dt_bias"])
        assert isinstance(y, mx.array)
        return (y * v["dy"]).sum()

    plain = mx.grad(loss, argnums=(0, 1))(v["x"], v["dt"])
    again = mx.grad(mx.checkpoint(loss), argnums=(0, 1))(v["x"], v["dt"])
    for a, b in zip(plain, again, strict=True):
        assert np.array_equal(np.array(a), np.array(b))


def test_inside_compile_the_host_says_what_to_do() -> None:
    if launch.Dialect.HOST not in launch.available():
        pytest.skip("no C++ compiler, or a GPU is the device")
    v = {name: mx.array(a, mx.float32) for name, a in random_inputs(1, 3, 8, 4).items()}
    compiled = mx.compile(lambda x: selective_scan(x, v["dt"], v["A"], v["b"], v["c"]))
    with launch.use("host"), pytest.raises(launch.TracedError, match=r"inside mx\.compile"):
        compiled(v["x"])


@pytest.mark.parametrize(("name", "shape"), [
    ("x", (2, 4)), ("dt", (2, 4, 9)), ("A", (7, 16)), ("b", (2, 4, 15)), ("c", (1, 4, 16)), ("skip", (9,)),
    ("z", (2, 5, 8)), ("dt_bias", (1, 8)), ("reset", (2, 3)), ("state", (2, 16, 8)),
])  # fmt: skip
def test_a_wrong_shape_is_named(name: str, shape: tuple[int, ...]) -> None:
    arrays = dict(
        zip(PLAIN, (mx.zeros(s) for s in ((2, 4, 8), (2, 4, 8), (8, 16), (2, 4, 16), (2, 4, 16))), strict=True)
    )
    arguments = [mx.zeros(shape) if n == name else a for n, a in arrays.items()]
    optional = {} if name in PLAIN else {name: mx.zeros(shape)}
    with pytest.raises(ValueError, match=rf"selective_scan: {name.split('_')[0]}.* has shape"):
        selective_scan(*arguments, **optional)
