"""The optimiser over a tree, the schedule and the clip."""

import math

import numpy as np
import pytest

from magellano import optimizer as module
from magellano.backend import mx, nn, tree_flatten, tree_unflatten
from magellano.names import StateDtype
from magellano.ops import adamw as op
from magellano.optimizer import AdamW, clip_by_global_norm, cosine_with_warmup, global_norm, gradient_factor


def model() -> nn.Module:
    mx.random.seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def gradients(m: nn.Module, seed: int) -> dict:  # type: ignore[type-arg]
    x = mx.random.normal((8, 6), key=mx.random.key(seed))
    return nn.value_and_grad(m, lambda m: m(x).square().mean())(m)[1]


def train(optimizer: AdamW, steps: int, first: int = 0, m: nn.Module | None = None) -> nn.Module:
    m = m or model()
    for t in range(first, first + steps):
        optimizer.update(m, gradients(m, t))
        mx.eval(m.parameters(), optimizer.state)
    return m


def values(m: nn.Module) -> dict[str, np.ndarray]:
    return {name: np.array(a) for name, a in tree_flatten(m.parameters())}


def test_a_step_is_the_formula() -> None:
    m = model()
    w, g = values(m), dict(tree_flatten(gradients(m, 0)))
    optimizer = AdamW(0.01, (0.9, 0.99), 1e-8, 0.1, decays=lambda name: name.endswith("weight"))
    optimizer.init(m.trainable_parameters())
    optimizer.update(m, gradients(m, 0))
    for name, new in values(m).items():
        grad = np.array(g[name], np.float64)
        decayed = w[name] * (1 - 0.01 * 0.1) if name.endswith("weight") else w[name]
        np.testing.assert_allclose(new, decayed - 0.01 * grad / (np.abs(grad) + 1e-8), rtol=1e-4, atol=1e-6)
    assert optimizer.step.item() == 1


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("state", list(StateDtype))
def test_state_goes_through_files_and_training_repeats(state: StateDtype, amsgrad: bool, tmp_path) -> None:  # type: ignore[no-untyped-def]
    def make() -> AdamW:
        return AdamW(0.01, state=state, seed=5, amsgrad=amsgrad)

    whole = train(make(), 6)
    first = make()
    half = train(first, 3)
    mx.save_safetensors(str(tmp_path / "state.safetensors"), dict(tree_flatten(first.state)))
    second = make()
    second.state = tree_unflatten(list(mx.load(str(tmp_path / "state.safetensors")).items()))
    assert second.step.item() == 3
    rest = train(second, 3, first=3, m=half)
    for name, value in values(rest).items():
        np.testing.assert_array_equal(value, values(whole)[name])


def test_16_bit_states_are_16_bits_and_follow_the_seed() -> None:
    optimizer = AdamW(0.01, state=StateDtype.FLOAT16, seed=1)
    a = train(optimizer, 4)
    assert {v.dtype for name, v in optimizer.state.items() if name != "step"} == {mx.float16}
    same, other = (values(train(AdamW(0.01, state=StateDtype.FLOAT16, seed=s), 4)) for s in (1, 2))
    assert all((same[name] == value).all() for name, value in values(a).items())
    assert any((other[name] != value).any() for name, value in same.items())


def test_learning_rate_of_a_call_and_factor() -> None:
    p = {"w": mx.array([1.0, 2.0])}
    g = {"w": mx.array([4.0, -8.0])}
    still = AdamW(0.5, weight_decay=0.0).apply_gradients(g, p, learning_rate=0.0)
    np.testing.assert_array_equal(still["w"], p["w"])
    a, b = AdamW(0.1), AdamW(0.1)
    halves = {"w": g["w"] / 2}
    for _ in range(3):
        left, right = a.apply_gradients(g, p, factor=0.5), b.apply_gradients(halves, p)
        np.testing.assert_allclose(left["w"], right["w"], rtol=1e-6)


def rate(step: int) -> float:
    return 0.02 / (1 + step)


@pytest.mark.parametrize("small", [2, 1 << 18])  # elements from which a tensor steps alone, or all together
def test_parameters_with_rates_of_their_own_step_as_by_optimisers_of_their_own(
    small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SMALL_ON_CPU", small)
    monkeypatch.setattr(module, "SMALL_ON_GPU", small)
    monkeypatch.setattr(module, "_WINDOW", 3)
    p = {"x.lora_a": mx.array([1.0, 2.0]), "x.lora_b": mx.array([[3.0], [-1.0]]), "y.lora_b": mx.array([5.0, 6.0])}
    both = AdamW(rate, weight_decay=0.1, rates=lambda name: 16.0 if name.endswith("b") else 1.0)
    slow, fast = AdamW(rate, weight_decay=0.1), AdamW(lambda step: 16.0 * rate(step), weight_decay=0.1)
    apart = p
    for step in range(5):  # over a border of the window
        g = {name: a * step - 1 for name, a in p.items()}
        p = both.apply_gradients(g, p)
        a = slow.apply_gradients({"x.lora_a": g["x.lora_a"]}, {"x.lora_a": apart["x.lora_a"]})
        names = ("x.lora_b", "y.lora_b")
        apart = a | fast.apply_gradients({n: g[n] for n in names}, {n: apart[n] for n in names})
        for name in p:
            np.testing.assert_array_equal(p[name], apart[name], name)
    given = both.apply_gradients(g, p, learning_rate=0.01)
    wanted = fast.apply_gradients({n: g[n] for n in names}, {n: p[n] for n in names}, learning_rate=0.16)
    np.testing.assert_allclose(given["x.lora_b"], wanted["x.lora_b"], rtol=1e-6)


@pytest.mark.parametrize("state", list(StateDtype))
def test_a_schedule_is_the_rates_given_one_by_one(state: StateDtype) -> None:
    scheduled, told, resumed = AdamW(rate, state=state), AdamW(9.0, state=state), AdamW(rate, state=state)
    p = q = {"w": mx.array([1.0, 2.0])}
    for step in range(150):  # over two borders of the window
        g = {"w": mx.array([4.0, -8.0]) * (step % 5)}
        optimizer = scheduled if step < 100 else resumed
        p, q = optimizer.apply_gradients(g, p), told.apply_gradients(g, q, learning_rate=rate(step))
        np.testing.assert_array_equal(p["w"], q["w"])
        if step == 99:
            resumed.state = scheduled.state


def test_settings_may_change_between_steps() -> None:
    p, g = {"w": mx.array([1.0, 2.0])}, {"w": mx.array([4.0, -8.0])}
    optimizer = AdamW(0.1, weight_decay=0.0)
    p = optimizer.apply_gradients(g, p)
    optimizer.learning_rate = 0.0
    still = optimizer.apply_gradients(g, p)
    np.testing.assert_array_equal(still["w"], p["w"])
    optimizer.learning_rate, optimizer.weight_decay = 1e-9, 1e8
    np.testing.assert_allclose(optimizer.apply_gradients(g, still)["w"], np.array(p["w"]) * 0.9, rtol=1e-6)


def test_a_step_uploads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    m, optimizer = model(), AdamW(rate, state=StateDtype.FLOAT16)
    g = gradients(m, 0)
    optimizer.update(m, g, factor=gradient_factor(global_norm(g), 1.0, 8.0))

    def fail(values: np.ndarray) -> mx.array:
        raise AssertionError(f"a step uploads {values}")

    monkeypatch.setattr(op, "_on_device", fail)
    for _ in range(60):
        optimizer.update(m, g, factor=gradient_factor(global_norm(g), 1.0, 8.0))
    with pytest.raises(AssertionError, match="uploads"):
        optimizer.update(m, g, learning_rate=0.1)


def test_parameters_that_were_handed_out_are_not_joined_again(monkeypatch: pytest.MonkeyPatch) -> None:
    joined: list[int] = []
    join = module.join
    monkeypatch.setattr(module, "join", lambda arrays: joined.append(len(arrays)) or join(arrays))
    kept, copied = AdamW(0.01, state=StateDtype.FLOAT16), AdamW(0.01, state=StateDtype.FLOAT16)
    m, other = model(), model()
    for step in range(4):
        g = gradients(model(), step)  # not of m, for nn.value_and_grad puts new objects into the model
        joined.clear()
        kept.update(m, g)
        assert joined[-1:] == [4]
        assert len(joined) == (1 if step else 4)  # at first m, s and the weights too
        other.update(tree_unflatten([(name, a + 0) for name, a in tree_flatten(other.parameters())]))
        joined.clear()
        copied.update(other, g)
        assert len(joined) == (2 if step else 4)
        for name, a in values(other).items():
            np.testing.assert_array_equal(values(m)[name], a)
    m.layers[0].bias = m.layers[0].bias + 1  # one of them is somebody else's now
    before = values(m)
    kept.update(m, gradients(model(), 9), learning_rate=0.0)
    for name, a in values(m).items():
        np.testing.assert_array_equal(a, before[name])


def test_gradient_factor() -> None:
    for norm, scale, right in ((10.0, 1.0, 0.2), (1.0, 1.0, 1.0), (80.0, 8.0, 0.025), (8.0, 8.0, 0.125)):
        factor = gradient_factor(mx.array(norm), 2.0, scale)
        assert factor.shape == (8,)
        np.testing.assert_allclose(factor, np.full(8, right), rtol=1e-6)
    assert all(np.isnan(np.array(gradient_factor(mx.array(bad), 1.0))).all() for bad in (math.inf, math.nan))


@pytest.mark.parametrize("state", list(StateDtype))
def test_a_step_with_an_infinite_gradient_can_be_taken_back(state: StateDtype) -> None:
    clean, hit = (AdamW(rate, state=state, seed=3) for _ in range(2))
    p = q = {"w": mx.array([1.0, -2.0, 0.5])}
    for step in range(4):
        g = {"w": mx.array([0.1, -0.2, 0.3]) * (step + 1)}
        bad = {"w": mx.array([0.1, math.inf, 0.3])}
        q = hit.apply_gradients(bad, q, factor=gradient_factor(global_norm(bad), 1.0))
        hit.take_back()
        p = clean.apply_gradients(g, p, factor=gradient_factor(global_norm(g), 1.0))
        q = hit.apply_gradients(g, q, factor=gradient_factor(global_norm(g), 1.0))
        np.testing.assert_array_equal(p["w"], q["w"])
    assert hit.step.item() == 4


def test_frozen_parts_stay() -> None:
    m = model()
    m.layers[0].freeze()
    before = values(m)
    train(AdamW(0.01), 2, m=m)
    after = values(m)
    assert (before["layers.0.weight"] == after["layers.0.weight"]).all()
    assert (before["layers.2.weight"] != after["layers.2.weight"]).any()


def test_schedule() -> None:
    lr, warmup, steps, ratio = 2e-3, 10, 110, 0.1
    rates = [cosine_with_warmup(t, lr, warmup, steps, ratio) for t in range(steps)]
    np.testing.assert_allclose(rates[:10], [lr * (t + 1) / 10 for t in range(10)])
    assert rates[10] == pytest.approx(lr)
    assert rates[-1] == pytest.approx(lr * ratio)
    at = cosine_with_warmup(59, lr, warmup, steps, ratio)
    assert at == pytest.approx(lr * (0.55 + 0.45 * math.cos(math.pi * (59 - 10) / 99)))
    assert (np.diff(rates[10:]) <= 0).all()
    assert cosine_with_warmup(5000, lr, warmup, steps, ratio) == pytest.approx(lr * ratio)
    assert cosine_with_warmup(0, lr, 0, 1, ratio) == pytest.approx(lr)


def test_clip() -> None:
    g = {"a": mx.array([3.0]), "b": {"c": mx.array([[4.0]])}}
    clipped, norm = clip_by_global_norm(g, 1.0)
    assert norm.item() == pytest.approx(5.0)
    assert clipped["a"].item() == pytest.approx(0.6)
    assert clipped["b"]["c"].item() == pytest.approx(0.8)
    same, _ = clip_by_global_norm(g, 10.0)
    assert same["a"].item() == 3.0
    _, bad = clip_by_global_norm({"a": mx.array([float("nan")])}, 1.0)
    assert math.isnan(bad.item())


def test_consuming_is_updating_and_empties_the_dict() -> None:
    updated, consumed = model(), model()
    one, other = AdamW(0.01), AdamW(0.01)
    for t in range(3):
        one.update(updated, gradients(updated, t))
        by_name = dict(tree_flatten(gradients(consumed, t)))
        other.consume(consumed, by_name)
        assert not by_name
    for name, expected in values(updated).items():
        np.testing.assert_array_equal(values(consumed)[name], expected)


def test_small_tensors_step_together_up_to_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    together, apart = AdamW(0.01), AdamW(0.01)
    expected = values(train(together, 3))
    monkeypatch.setattr(module, "JOINED", 20)  # of 30, 5, 15 and 3 elements; a tensor above the bound goes alone
    found = values(train(apart, 3))
    assert [len(group.names) for group in together._groups] == [4]
    sizes = [sum(math.prod(shape) for shape in group.shapes) for group in apart._groups]
    assert len(sizes) > 1
    assert max(sizes) == 30
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])
