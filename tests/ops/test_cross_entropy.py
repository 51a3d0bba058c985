"""Loss and every gradient against float64, in every dialect."""

import numpy as np
import pytest

from magellano import nf4
from magellano.backend import mx, on_gpu
from magellano.ops import cross_entropy, linear_cross_entropy, token_scores
from magellano.ops.cross_entropy import Renyi


def inputs(M: int, D: int, V: int, r: int = 0, scale: float = 1.0, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    v = {"x": rng.standard_normal((M, D)) * scale, "w": rng.standard_normal((V, D)) / D**0.5}
    if r:
        v |= {"u": rng.standard_normal((M, r)), "b": rng.standard_normal((V, r)) / 2}
    v |= {"target": rng.integers(0, V, M), "weight": rng.uniform(0.5, 2, M) * (rng.random(M) < 0.7)}
    return {k: a.astype(np.int32 if k == "target" else np.float32) for k, a in v.items()}


def expected(v: dict[str, np.ndarray]) -> tuple[float, dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """Loss, gradients, -log p of each target and whether it is the likeliest, all in float64."""
    v = {k: a if k == "target" else a.astype(np.float64) for k, a in v.items()}
    logits = v["x"] @ v["w"].T + (v["u"] @ v["b"].T if "u" in v else 0)
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    rows = np.arange(len(logits))
    nll = -log_p[rows, v["target"]]
    g = np.exp(log_p)
    g[rows, v["target"]] -= 1
    g *= v["weight"][:, None]
    gradients = {"x": g @ v["w"], "w": g.T @ v["x"]}
    if "u" in v:
        gradients |= {"u": g @ v["b"], "b": g.T @ v["u"]}
    return (nll * v["weight"]).sum(), gradients, nll, logits.argmax(1) == v["target"]


def computed(v: dict[str, np.ndarray], chunk: int, dtype: mx.Dtype = mx.float32, w=None) -> tuple[float, dict]:  # type: ignore[no-untyped-def,type-arg]
    names = [name for name in ("x", "w", "u", "b") if name in v and not (name == "w" and w is not None)]
    target, weight = mx.array(v["target"]), mx.array(v["weight"])

    def loss(*arrays: mx.array) -> mx.array:
        a = {"w": w, "u": None, "b": None, **dict(zip(names, arrays, strict=True))}
        return 3.0 * linear_cross_entropy(a["x"], a["w"], target, weight, a["u"], a["b"], chunk)

    arrays = [mx.array(v[name]).astype(dtype) for name in names]
    value, gradients = mx.value_and_grad(loss, argnums=list(range(len(names))))(*arrays)
    if len(names) == 1:
        gradients = [gradients]  # MLX hands a single one over bare
    return value.item() / 3, {n: np.array(g.astype(mx.float32)) / 3 for n, g in zip(names, gradients, strict=True)}


def compare(gradients: dict[str, np.ndarray], right: dict[str, np.ndarray], tolerance: float) -> None:
    for name, g in gradients.items():
        assert np.abs(g - right[name]).max() <= tolerance * np.abs(right[name]).max() + 1e-30, name


@pytest.fixture(autouse=True)
def several_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Vocabularies over 64 are walked in slices of 64."""
    monkeypatch.setattr(cross_entropy, "_SLICE_WEIGHTS", 1)
    monkeypatch.setattr(nf4, "SLICE_VALUES", 1)


@pytest.mark.parametrize(("M", "D", "V", "r"), [(1, 8, 5, 0), (37, 32, 101, 4), (64, 16, 64, 0), (19, 48, 1027, 3)])
def test_loss_and_gradients(M: int, D: int, V: int, r: int, dialect: str) -> None:
    v = inputs(M, D, V, r)
    v["weight"][0] = 1.0
    loss, right, _, _ = expected(v)
    value, gradients = computed(v, chunk=16)
    assert value == pytest.approx(loss, rel=1e-6)
    compare(gradients, right, 2e-6)


def test_quantised_head(dialect: str) -> None:
    v = inputs(37, 64, 150, 4)
    q = nf4.quantize(mx.array(v["w"]))
    v["w"] = np.array(q.dequantize())
    loss, right, _, _ = expected(v)
    value, gradients = computed(v, chunk=16, w=q)
    assert value == pytest.approx(loss, rel=1e-6)
    assert set(gradients) == {"x", "u", "b"}
    compare(gradients, right, 2e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(mx.float16, 4e-3), (mx.bfloat16, 3e-2)])
def test_sixteen_bits(dtype: mx.Dtype, tolerance: float, dialect: str) -> None:
    v = inputs(20, 32, 101, 4)
    for name in ("x", "w", "u", "b"):  # the reference starts from the rounded values
        v[name] = np.array(mx.array(v[name]).astype(dtype).astype(mx.float32))
    loss, right, _, _ = expected(v)
    value, gradients = computed(v, chunk=8, dtype=dtype)
    assert value == pytest.approx(loss, rel=tolerance)
    compare(gradients, right, tolerance)


def test_weight_zero_counts_nothing(dialect: str) -> None:
    v = inputs(24, 16, 70)
    v["weight"][:] = 0
    v["target"][:] = -7  # whatever it is
    value, gradients = computed(v, chunk=5)
    assert value == 0.0
    assert all((g == 0).all() for g in gradients.values())


def test_a_row_of_weight_zero_may_hold_anything(dialect: str) -> None:
    v = inputs(24, 16, 70)
    v["weight"][:] = 1
    v["weight"][3] = 0
    v["x"][3] = np.nan
    value, gradients = computed(v, chunk=5, w=nf4.quantize(mx.array(v["w"])))
    assert np.isfinite(value)
    assert np.isfinite(gradients["x"]).all()
    assert (gradients["x"][3] == 0).all()


def test_logits_of_ten_thousand(dialect: str) -> None:
    v = inputs(24, 16, 70)
    v["x"] *= 1e4
    loss, right, _, _ = expected(v)
    assert loss > 1e5
    value, gradients = computed(v, chunk=7)
    assert value == pytest.approx(loss, rel=1e-5)
    compare({"x": gradients["x"]}, right, 1e-3)
    v["target"][:] = np.argmax(v["x"] @ v["w"].T, 1)
    assert computed(v, chunk=7)[0] == pytest.approx(expected(v)[0], abs=1e-2)


def test_chunks_do_not_matter(dialect: str) -> None:
    v = inputs(33, 16, 70, 2)
    assert computed(v, chunk=1)[0] == pytest.approx(computed(v, chunk=512)[0], rel=1e-6)


def test_same_inputs_give_the_same_bits(dialect: str) -> None:
    v = inputs(33, 16, 70, 2)
    (a, first), (b, second) = computed(v, 8), computed(v, 8)
    assert a == b
    assert all((first[name] == second[name]).all() for name in first)


def test_scores(dialect: str) -> None:
    v = inputs(40, 16, 70, 2)
    v["target"][:20] = (v["x"] @ v["w"].T + v["u"] @ v["b"].T).argmax(1)[:20]
    _, _, nll, correct = expected(v)
    arrays = [mx.array(v[name]) for name in ("x", "w", "target", "weight", "u", "b")]
    found, right = token_scores(*arrays, chunk=9)
    live = v["weight"] != 0
    np.testing.assert_allclose(np.array(found)[live], nll[live], rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(np.array(right), correct & live)
    assert (np.array(found)[~live] == 0).all()
    assert right.dtype == mx.bool_


def test_equal_scores_are_not_correct(dialect: str) -> None:
    _, right = token_scores(mx.ones((3, 8)), mx.ones((5, 8)), mx.zeros((3,), mx.int32), mx.ones((3,)))
    assert not right.any().item()


def test_inside_compile(dialect: str) -> None:
    v = inputs(33, 16, 70)
    target, weight, w = mx.array(v["target"]), mx.array(v["weight"]), mx.array(v["w"])
    gradient = mx.value_and_grad(lambda x: linear_cross_entropy(x, w, target, weight, chunk=8, frozen=True))
    x = mx.array(v["x"])
    (a, dx), (b, dx2) = gradient(x), mx.compile(gradient)(x)
    assert a.item() == pytest.approx(b.item(), rel=1e-5)
    np.testing.assert_allclose(dx, dx2, rtol=1e-4, atol=1e-6)


def test_memory_stays_far_below_all_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cross_entropy, "_SLICE_WEIGHTS", 64 * 2048)
    # A GPU frees what launches used once a batch of them is done, some of which are under way: chunks must be many.
    M, D, V = 16384 if on_gpu() else 1024, 64, 16384
    x, w = mx.random.normal((M, D)), mx.random.normal((V, D))
    target, weight = mx.zeros((M,), mx.int32), mx.ones((M,))
    mx.eval(x, w, target, weight)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(mx.value_and_grad(lambda x: linear_cross_entropy(x, w, target, weight, chunk=64, frozen=True))(x))
    logits = 4 * M * V
    assert mx.get_peak_memory() - before < logits / 4


def entropy_term(v: dict[str, np.ndarray], alpha: float) -> tuple[float, np.ndarray]:
    """sum of weight * H_alpha in float64, and its gradient in x."""
    x, w, weight = (v[name].astype(np.float64) for name in ("x", "w", "weight"))
    logits = x @ w.T
    shifted = logits - logits.max(1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    p = np.exp(log_p)
    if alpha == 1.0:
        h = -(p * log_p).sum(1)
        dlogits = -p * (log_p + h[:, None])
    else:
        h = np.log((p**alpha).sum(1)) / (1 - alpha)
        tilted = p**alpha / (p**alpha).sum(1, keepdims=True)
        dlogits = alpha / (1 - alpha) * (tilted - p)
    return (weight * h).sum(), (weight[:, None] * dlogits) @ w


@pytest.mark.parametrize("alpha", [0.5, 0.76, 0.99, 1.0, 1.0 + 1e-5, 1.1, 2.0, 4.0])
def test_renyi_entropy(alpha: float, dialect: str) -> None:
    v = inputs(21, 16, 101, scale=1.5)
    loss, right, _, _ = expected(v)
    h, dh = entropy_term(v, alpha)
    w, target, weight = mx.array(v["w"]), mx.array(v["target"]), mx.array(v["weight"])
    beta = 0.3

    def objective(x: mx.array) -> mx.array:
        return linear_cross_entropy(x, w, target, weight, chunk=8, frozen=True, renyi=Renyi(alpha, beta))

    value, dx = mx.value_and_grad(objective)(mx.array(v["x"]))
    assert value.item() == pytest.approx(loss - beta * h, rel=3e-6)
    wanted = right["x"] - beta * dh
    assert np.abs(np.array(dx) - wanted).max() <= 5e-6 * np.abs(wanted).max()


def test_the_loss_without_its_entropy_term(dialect: str) -> None:
    v = inputs(21, 16, 101)
    w, target, weight = mx.array(v["w"]), mx.array(v["target"]), mx.array(v["weight"])

    def sums(x: mx.array, renyi: Renyi | None) -> tuple[mx.array, mx.array]:
        return cross_entropy.objective_and_nll(x, w, target, weight, chunk=8, frozen=True, renyi=renyi)

    x, renyi = mx.array(v["x"]), Renyi(2.0, 0.5)
    (plain, same), (objective, nll) = sums(x, None), sums(x, renyi)
    assert nll.item() == plain.item() == same.item()
    assert objective.item() < nll.item()
    alone, both = (mx.grad(f)(x) for f in (lambda x: sums(x, renyi)[0], lambda x: mx.add(*sums(x, renyi))))
    np.testing.assert_array_equal(alone, both)


def test_renyi_entropy_tends_to_shannons(dialect: str) -> None:
    v = inputs(21, 16, 101)
    (a, da), (b, db) = entropy_term(v, 1.0), entropy_term(v, 1.0 + 1e-6)
    assert a == pytest.approx(b, rel=1e-5)
    np.testing.assert_allclose(da, db, atol=1e-4)
    w, target, weight = mx.array(v["w"]), mx.array(v["target"]), mx.array(v["weight"])
    values = [
        linear_cross_entropy(mx.array(v["x"]), w, target, weight, frozen=True, renyi=Renyi(alpha, 1.0)).item()
        for alpha in (1 - 1e-3, 1 - 1e-6, 1.0, 1 + 1e-6, 1 + 1e-3)
    ]
    assert values[1] == pytest.approx(values[2], rel=1e-5)
    assert values[3] == pytest.approx(values[2], rel=1e-5)
    assert values[0] < values[2] < values[4]  # the entropy falls with its order


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_renyi_entropy_of_logits_of_ten_thousand(alpha: float, dialect: str) -> None:
    v = inputs(24, 16, 70)
    v["x"] *= 1e4
    w, target, weight = mx.array(v["w"]), mx.array(v["target"]), mx.array(v["weight"])
    value, dx = mx.value_and_grad(
        lambda x: linear_cross_entropy(x, w, target, weight, chunk=7, frozen=True, renyi=Renyi(alpha, 0.5))
    )(mx.array(v["x"]))
    assert value.item() == pytest.approx(expected(v)[0], rel=1e-5)  # such a softmax has no entropy
    assert np.isfinite(np.array(dx)).all()
