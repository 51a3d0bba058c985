"""The model against transformers' Mamba, packed documents against documents alone, streaming against the full
forward.
"""

from pathlib import Path

import numpy as np
import pytest

from magellano import lora
from magellano.backend import mx, nn, tree_flatten
from magellano.backprop import Backprop, Batch
from magellano.layout import ParamSpec, count, lora_count, parameters
from magellano.model import MagellanoLM, seeded
from magellano.names import LayerKind
from magellano.ops import launch
from magellano.ops.launch import Dialect
from magellano.profile import LoraConfig, ModelConfig, load_profile

GOLDEN = Path(__file__).parent / "golden" / "mamba.safetensors"
SMALL = ModelConfig(d_model=48, n_layers=4, n_experts=4, d_ff=40, d_state=5, dt_rank=6, vocab_size=300)


def relative(a: mx.array, b: mx.array) -> float:
    a, b = np.array(a, np.float64), np.array(b, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("keeps", [False, True])
def test_mamba_layers_equal_transformers(keeps: bool) -> None:
    """Logits, loss and every gradient of a pure Mamba model, layer by layer and whole."""
    golden = mx.load(str(GOLDEN))
    config = ModelConfig(d_model=32, n_layers=2, d_ff=8, d_state=4, dt_rank=3, vocab_size=300)
    assert [config.kind(i) for i in range(2)] == [LayerKind.MAMBA] * 2

    def source(spec: ParamSpec) -> mx.array:
        value = golden[f"weight.{spec.name}"]
        assert tuple(value.shape) == spec.shape, spec.name
        return value

    model = MagellanoLM(config, source)
    tokens = golden["tokens"]
    assert relative(model(tokens), golden["logits"]) < 2e-5
    model.chunk = 7
    batch = Batch(tokens[:, :-1], tokens[:, 1:], mx.ones((2, 18)), mx.zeros((2, 18), dtype=mx.uint8))
    found = Backprop(model, keeps=keeps)(batch, 1 / 36)
    assert abs(found.nll.item() / 36 - golden["loss"].item()) < 1e-5
    assert {f"grad.{name}" for name in found.gradients} == {name for name in golden if name.startswith("grad.")}
    for name, grad in found.gradients.items():
        assert relative(grad, golden[f"grad.{name}"]) < 1e-4, name


def test_packed_documents_give_the_same_logits_as_alone() -> None:
    model = MagellanoLM(SMALL, seeded(1))
    rng = np.random.default_rng(0)
    docs = [mx.array(rng.integers(0, 300, (1, n))) for n in (1, 2, 7, 3, 12)]
    starts = np.zeros((1, 25), np.uint8)
    starts[0, np.cumsum([0, 1, 2, 7, 3])] = 1
    packed = model(mx.concatenate(docs, axis=1), mx.array(starts))
    at = 0
    for doc in docs:
        alone = model(doc)
        assert relative(packed[:, at : at + doc.shape[1]], alone) < 1e-5, f"document at {at}"
        at += doc.shape[1]


@pytest.mark.parametrize("chunks", [[1] * 11, [4, 1, 6], [11]])
def test_streaming_equals_the_full_forward(chunks: list[int]) -> None:
    model = MagellanoLM(SMALL, seeded(2))
    tokens = mx.array(np.random.default_rng(1).integers(0, 300, (2, 11)))
    full = model(tokens)
    state, at = model.initial_state(2), 0
    for n in chunks:
        logits, state = model.step(tokens[:, at : at + n], state)
        assert relative(logits, full[:, at : at + n]) < 1e-5, f"tokens {at}..{at + n}"
        at += n


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("routers", [None, (0.5, 0.25)])
@pytest.mark.parametrize("adapted", [False, True])
def test_gradients_in_both_forms_are_those_of_the_model(
    routers: tuple[float, float] | None, adapted: bool, keeps: bool
) -> None:
    rng = np.random.default_rng(2)
    tokens, targets = (mx.array(rng.integers(0, 300, (2, 9))) for _ in range(2))
    reset, weights = mx.array((rng.random((2, 9)) < 0.3).astype(np.uint8)), mx.array(rng.random((2, 9)))
    model = MagellanoLM(SMALL, seeded(3))
    if adapted:
        start = lora.start(SMALL, LoraConfig(rank=4))
        lora.attach(model, LoraConfig(rank=4), {n: a + 0.1 * mx.random.normal(a.shape) for n, a in start.items()})

    def loss() -> tuple[mx.array, mx.array, mx.array]:
        h, losses = model.backbone.embeddings(tokens), mx.zeros((2,))
        for layer in model.backbone.layers:
            h, routed = layer(h, reset)
            losses = losses if routed is None else losses + routed.losses
        total = 0.0 if routers is None else (mx.array(routers) * losses).sum()
        nll = model.objective(model.backbone.norm_f(h), targets, weights)[0]
        return total + 0.3 * nll, nll, losses

    (_, nll, losses), grads = nn.value_and_grad(model, loss)()
    wanted = dict(tree_flatten(grads))
    found = Backprop(model, keeps=keeps)(Batch(tokens, targets, weights, reset), 0.3, routers)
    assert found.gradients.keys() == wanted.keys()
    for name, value in wanted.items():
        assert relative(found.gradients[name], value) < 1e-5, name
    assert relative(found.nll, nll) < 1e-6
    assert relative(found.routers, losses) < 1e-6
    squares = sum(np.square(np.array(g, np.float64)).sum() for g in wanted.values())
    assert np.array(found.squares, np.float64).sum() == pytest.approx(squares, rel=1e-5)


@pytest.mark.parametrize(
    ("name", "millions", "tolerance"),
    [("phase1", 77, 0.01), ("phase2", 400, 0.01), ("phase3", 800, 0.01), ("production3b", 3284, 0.001)],
)
def test_profiles_have_their_stated_size(name: str, millions: int, tolerance: float) -> None:
    assert abs(count(load_profile(name).model) / (millions * 1e6) - 1) <= tolerance


def test_production3b_trains_about_164_million() -> None:
    profile = load_profile("production3b")
    assert abs(lora_count(profile.model, profile.lora) / 164e6 - 1) < 0.01


def test_counting_and_building_allocate_nothing() -> None:
    mx.clear_cache()
    before = mx.get_active_memory()
    config = load_profile("production3b").model
    model = MagellanoLM(config)
    shapes = {name: tuple(value.shape) for name, value in tree_flatten(model.parameters())}
    assert shapes == {spec.name: spec.shape for spec in parameters(config)}
    assert mx.get_active_memory() - before < 64 << 20
    assert [config.kind(i) for i in range(8)] == [LayerKind.MAMBA] * 3 + [LayerKind.MOE] + [LayerKind.MAMBA] * 3 + [
        LayerKind.MOE
    ]


def test_compiled_layers_give_the_same_gradients_and_a_batch_that_outgrows_its_rooms_is_done_again() -> None:
    rng = np.random.default_rng(4)
    model = MagellanoLM(SMALL, seeded(3))
    reset, weights = mx.zeros((2, 40), dtype=mx.uint8), mx.ones((2, 40))
    batches = [Batch(*(mx.array(rng.integers(0, n, (2, 40))) for _ in range(2)), weights, reset) for n in (300, 2)]
    with launch.use(Dialect.REFERENCE):
        plain, compiled = Backprop(model), Backprop(model)
        compiled._compiles = True  # as on a GPU
        passes = 0
        once = compiled._pass

        def counted(*args):  # type: ignore[no-untyped-def]
            nonlocal passes
            passes += 1
            return once(*args)

        compiled._pass = counted  # type: ignore[method-assign]
        for number, batch in enumerate(batches):
            wanted, found = plain(batch, 0.5).gradients, compiled(batch, 0.5).gradients
            for name, value in wanted.items():
                assert relative(found[name], value) < 1e-4, f"batch {number}: {name}"
            assert passes == [1, 3][number]  # a batch of two tokens sends all its copies to few experts
        assert compiled.loads[3] == [max(pair) for pair in zip(*compiled_loads(model, batches), strict=True)]


def compiled_loads(model: MagellanoLM, batches: list[Batch]) -> list[list[int]]:
    """Token copies per expert of the model's one MoE layer, for each batch."""
    return [model.expert_counts(batch.tokens, batch.reset)[0] for batch in batches]
