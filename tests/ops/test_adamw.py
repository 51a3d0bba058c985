"""AdamW's step against float64, in every dialect, and 2,000 steps with 16-bit states."""

import math

import numpy as np
import pytest

from magellano.backend import mx
from magellano.ops import adamw as module
from magellano.ops.adamw import SCALE, Moments, Step, adamw, reference

LR, B1, B2, EPS, DECAY = 1e-2, 0.9, 0.999, 1e-8, 0.1


def exact(w, g, m, v, peak, t, lr=LR, factor=1.0, decay=DECAY, b2=B2):  # type: ignore[no-untyped-def]
    """One step in float64: w, m, v, the largest v so far."""
    g = g * factor
    m = B1 * m + (1 - B1) * g
    v = b2 * v + (1 - b2) * g * g
    peak = None if peak is None else np.maximum(peak, v)
    under = v if peak is None else peak
    w = w * (1 - lr * decay) - lr * (m / (1 - B1**t)) / (np.sqrt(under / (1 - b2**t)) + EPS)
    return w, m, v, peak


def start(size: int, dtype: mx.Dtype, amsgrad: bool) -> Moments:
    return Moments(*(mx.zeros((size,), dtype) for _ in range(3 if amsgrad else 2)))


def step_of(t: int, factor: float = 1.0, lr: float = LR, decay: float = DECAY, b2: float = B2) -> Step:
    return Step(t, lr, B1, b2, EPS, decay, factor, salt=12345)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("size", [1, 7, 64, 513, 16384, 20001])
def test_float32_states(size: int, amsgrad: bool, dialect: str) -> None:
    rng = np.random.default_rng(size)
    w64 = rng.standard_normal(size)
    w, moments = mx.array(w64, dtype=mx.float32), start(size, mx.float32, amsgrad)
    state = (np.array(w, np.float64), np.zeros(size), np.zeros(size), np.zeros(size) if amsgrad else None)
    for t in (1, 2, 3, 4):
        g = (rng.standard_normal(size) * 10.0 ** -(t % 3)).astype(np.float32)
        state = exact(state[0], g.astype(np.float64), *state[1:], t, factor=0.5)
        w, moments = adamw(w, mx.array(g), moments, step_of(t, factor=0.5))
    np.testing.assert_allclose(w, state[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moments.m, state[1], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(np.array(moments.s) ** 2, state[2], rtol=1e-5, atol=1e-12)
    if amsgrad:
        np.testing.assert_allclose(np.array(moments.peak) ** 2, state[3], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("size", [1, 2048, 16384, 16391])
def test_dialects_agree_on_one_step_of_16_bit_states(size: int, dtype: mx.Dtype, kernel_dialect: str) -> None:
    rng = np.random.default_rng(size)
    w, g = (mx.array(rng.standard_normal(size), dtype=mx.float32).astype(dtype) for _ in range(2))
    states = [mx.array(np.abs(rng.standard_normal(size)) * SCALE * 0.1, dtype=mx.float16) for _ in range(3)]
    new_w, new = adamw(w, g, Moments(*states), step_of(9))
    right_w, right = reference(w, g, Moments(*states), step_of(9))
    assert new_w.dtype == dtype
    np.testing.assert_allclose(new_w.astype(mx.float32), right_w.astype(mx.float32), rtol=1e-2, atol=1e-6)
    for mine, theirs in ((new.m, right.m), (new.s, right.s), (new.peak, right.peak)):
        assert mine.dtype == mx.float16
        # A unit in the last place where a float32 rounding falls on the other side, and nearly always the same bits.
        np.testing.assert_allclose(mine.astype(mx.float32), theirs.astype(mx.float32), rtol=1.1e-3, atol=1e-7)
        assert (np.array(mine) == np.array(theirs)).mean() > 0.99


@pytest.mark.parametrize("several", [1 << 22, 4096])
def test_dialects_agree_on_small_states_and_on_two_packs_a_thread(
    several: int, kernel_dialect: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SEVERAL", several)
    module._plan.cache_clear()
    rng = np.random.default_rng(several)
    size = 8192
    w, g = mx.zeros((size,)), mx.array(10 ** rng.uniform(-11, -6, size), dtype=mx.float32)
    states = [mx.array(10 ** rng.uniform(-7.5, -3, size), dtype=mx.float16) for _ in range(3)]
    new_w, new = adamw(w, g, Moments(*states), step_of(9))
    module._plan.cache_clear()
    right_w, right = reference(w, g, Moments(*states), step_of(9))
    np.testing.assert_allclose(new_w, right_w, rtol=1e-5, atol=1e-9)
    for mine, theirs in ((new.m, right.m), (new.s, right.s), (new.peak, right.peak)):
        np.testing.assert_allclose(mine.astype(mx.float32), theirs.astype(mx.float32), rtol=1.1e-3, atol=6e-8)
        assert (np.array(mine) == np.array(theirs)).mean() > 0.99


@pytest.mark.parametrize(
    "x", [0.0, 3e-9, 4.1e-6, 2.0**-14 - 2.0**-37, 2.0**-14, 7.7e-5, 0.3, 1.0, 777.77, 65503.9, 7e4]
)
def test_rounding_goes_to_a_neighbour_and_keeps_the_mean(x: float) -> None:
    exact = float(np.float32(x))
    random = mx.arange(1 << 13, dtype=mx.uint32) << 19  # what counts of a random number: every value of its top bits
    found = np.array(module._round_half(mx.full((1 << 13,), exact, mx.float32), random), np.float64)
    lowest = min(exact, 65504.0)
    ulp = 2.0 ** max(np.floor(np.log2(lowest)) - 10, -24) if lowest else 2.0**-24
    below = np.floor(lowest / ulp) * ulp
    assert set(found) <= {below, below + ulp}
    assert (found == found.astype(np.float16)).all()
    assert abs(found.mean() - lowest) <= ulp * 2.0**-13


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("state", [mx.float32, mx.float16])
@pytest.mark.parametrize("size", [2048, 77])
def test_a_factor_that_is_not_finite_changes_nothing(size: int, state: mx.Dtype, factor: float, dialect: str) -> None:
    rng = np.random.default_rng(size)
    w = mx.array(rng.standard_normal(size), dtype=mx.float16)
    states = [mx.array(np.abs(rng.standard_normal(size)), dtype=state) for _ in range(3)]
    g = mx.full((size,), math.inf)
    new_w, new = adamw(w, g, Moments(*states), step_of(3, factor=factor))
    for mine, before in zip((new_w, new.m, new.s, new.peak), (w, *states), strict=True):
        assert mine.dtype == before.dtype
        np.testing.assert_array_equal(mine, before)


def test_numbers_on_the_device_are_those_given_as_floats(dialect: str) -> None:
    w, g, moments = mx.ones((64,)), mx.full((64,), 0.5), start(64, mx.float32, False)
    as_floats = adamw(w, g, moments, step_of(2, factor=0.25))[0]
    step = Step(2, mx.array(LR), B1, B2, EPS, DECAY, mx.array(0.25), salt=12345)
    np.testing.assert_allclose(adamw(w, g, moments, step)[0], as_floats, rtol=1e-7)


def test_the_numbers_of_many_steps_lie_in_one_array() -> None:
    rows = module.now_numbers(1, [0.1] * 3, (B1, B2))
    addresses = [np.array(row, copy=False).ctypes.data for row in rows]
    assert addresses == [addresses[0], addresses[0] + 32, addresses[0] + 64]


def test_stochastic_rounding_keeps_the_mean(dialect: str) -> None:
    size = 1 << 15
    moments = Moments(mx.zeros((size,), mx.float16), mx.full((size,), 0.1 * SCALE).astype(mx.float16))
    g = mx.full((size,), 3.0)
    v = 0.999 * (moments.s[0].item() / SCALE) ** 2 + 0.001 * 9
    total, repeats = 0.0, 8
    for t in range(repeats):
        total += np.array(adamw(mx.zeros((size,)), g, moments, step_of(t + 1))[1].s, np.float64).mean() / SCALE
    ulp = 2.0**-4 / SCALE  # of float16 near 100
    assert abs(total / repeats - np.sqrt(v)) < 4 * ulp / np.sqrt(size * repeats)


def noisy_problem(dtype: mx.Dtype, steps: int, size: int = 2048) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Descends size parabolas with noisy gradients of 1e-6 to 1e-2, one in eight of them mostly zero.

    Returns the parameters at the start, after `steps` steps with `dtype` states, and the same in float64.
    """
    rng = np.random.default_rng(3)
    scale, goal = 10 ** rng.uniform(-6, -2, size), rng.standard_normal(size) * 0.05
    sparse = np.arange(size) % 8 == 0
    first = (rng.standard_normal(size) * 0.05).astype(np.float32)
    w, moments = mx.array(first), start(size, dtype, False)
    state = (first.astype(np.float64), np.zeros(size), np.zeros(size), None)
    for t in range(1, steps + 1):
        noise, share = rng.standard_normal(size), np.where(sparse, 4.0 * (rng.random(size) < 0.05), 1.0)

        def gradient(at: np.ndarray) -> np.ndarray:
            return scale * share * (20 * (at - goal) + noise)  # noqa: B023

        state = exact(state[0], gradient(state[0]), *state[1:], t, lr=1e-3, decay=0.01)
        g = mx.array(gradient(np.array(w)), dtype=mx.float32)
        w, moments = adamw(w, g, moments, step_of(t, lr=1e-3, decay=0.01))
        mx.eval(w, moments.m, moments.s)
    return first, np.array(w), state[0]


def relative_error(run: tuple[np.ndarray, np.ndarray, np.ndarray]) -> float:
    first, found, right = run
    return float(np.linalg.norm(found - right) / np.linalg.norm(right - first))


def test_2000_steps_of_16_bit_states_stay_close() -> None:
    assert relative_error(noisy_problem(mx.float16, 2000)) <= 1e-3  # naive half states: 7e2


def test_float32_states_stay_closer() -> None:
    assert relative_error(noisy_problem(mx.float32, 300)) <= 1e-5


def test_rounding_repeats(dialect: str) -> None:
    first, second = (noisy_problem(mx.float16, 20, 300)[1] for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_states_beyond_float16_saturate(dialect: str) -> None:
    w, moments = adamw(mx.zeros((9,)), mx.full((9,), 1e6), start(9, mx.float16, False), step_of(1))
    assert np.isfinite(np.array(w)).all()
    assert (np.array(moments.m) == 65504).all()
    assert (np.array(moments.s) == 65504).all()


def test_inside_compile(dialect: str) -> None:
    w, g = mx.random.normal((70,)), mx.random.normal((70,))

    def once(w: mx.array, g: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        new, moments = adamw(w, g, start(70, mx.float32, False), step_of(1))
        return new, moments.m, moments.s

    for a, b in zip(once(w, g), mx.compile(once)(w, g), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
