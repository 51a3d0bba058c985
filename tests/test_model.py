"""The model against transformers' Mamba, packed documents against documents alone, streaming against the full
forward.
"""

from pathlib import Path

import numpy as np
import pytest

from magellano.backend import mx, nn, tree_flatten
from magellano.layout import ParamSpec, count, lora_count, parameters
from magellano.model import MagellanoLM, seeded
from magellano.names import LayerKind
from magellano.profile import ModelConfig, load_profile

GOLDEN = Path(__file__).parent / "golden" / "mamba.safetensors"
SMALL = ModelConfig(d_model=48, n_layers=4, n_experts=4, d_ff=40, d_state=5, dt_rank=6, vocab_size=300)


def relative(a: mx.array, b: mx.array) -> float:
    a, b = np.array(a, np.float64), np.array(b, np.float64)
    return float(np.abs(a - b).max() / np.abs(b).max())


def test_mamba_layers_equal_transformers() -> None:
    """Logits, loss and every gradient of a pure Mamba model, checkpointed layer by layer."""
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
    model.checkpointing = True
    targets, weights = tokens[:, 1:], mx.ones((2, 18))

    def loss(_: mx.array) -> mx.array:
        nll, *_ = model.loss_sum(tokens[:, :-1], targets, weights, mx.zeros((2, 18), dtype=mx.uint8), chunk=7)
        return nll / 36

    value, grads = nn.value_and_grad(model, loss)(tokens)
    assert abs(value.item() - golden["loss"].item()) < 1e-5
    for name, grad in tree_flatten(grads):
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


def test_checkpointing_changes_no_gradient() -> None:
    tokens = mx.array(np.random.default_rng(2).integers(0, 300, (2, 9)))
    reset, weights = mx.zeros((2, 9), dtype=mx.uint8), mx.ones((2, 9))
    grads = []
    for checkpointing in (False, True):
        model = MagellanoLM(SMALL, seeded(3))
        model.checkpointing = checkpointing
        step = nn.value_and_grad(
            model, lambda m=model: m.loss_sum(tokens, tokens, weights, reset, 5)[0] + m.hidden(tokens)[1].sum()
        )
        grads.append(dict(tree_flatten(step()[1])))
    for name, value in grads[0].items():
        assert relative(value, grads[1][name]) < 1e-5, name


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
