"""Keeping or recomputing activations: the same training either way, the estimate against MLX's counter, the choice."""

import gc
from pathlib import Path

import numpy as np
import pytest

from magellano import activations, layout, lora, nf4
from magellano.backend import mx, on_gpu
from magellano.data import shards
from magellano.layout import ParamSpec
from magellano.linear import Weight
from magellano.model import MagellanoLM, seeded
from magellano.names import LoraTarget, Recompute
from magellano.profile import LoraConfig, ModelConfig, TrainConfig
from magellano.trainer import Trainer

SHAPE = ModelConfig(d_model=96, n_layers=8, n_experts=4, d_ff=160, d_state=8, dt_rank=8, vocab_size=300)
CONFIG = TrainConfig(steps=3, batch=4, lr=1e-2, warmup=1, compute="float32")
T = 128
PROJECTIONS = (LoraTarget.IN_PROJ, LoraTarget.X_PROJ, LoraTarget.DT_PROJ, LoraTarget.OUT_PROJ)  # small ones
on_cpu = pytest.mark.skipif(on_gpu(), reason="a CPU's rule")


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    folder, rng = tmp_path / "tokens", np.random.default_rng(0)
    folder.mkdir()
    for split in ("train", "held_out"):
        ids, ones = rng.integers(0, 300, (12, T + 1)).astype(np.uint16), np.ones((12, T), np.uint8)
        shards.write_split(folder, split, [shards.Rows(ids[:, :-1], ids[:, 1:], ones, ones * 0)])
    shards.write_facts(folder, vocab_size=300, seq_len=T, rows={"train": 12, "held_out": 12})
    return folder


def model(adapted: bool) -> MagellanoLM:
    def quantized(spec: ParamSpec) -> Weight:
        w = seeded(3)(spec)
        if spec.target is None:
            return w
        return nf4.NF4Stack.of([nf4.quantize(x) for x in w]) if w.ndim == 3 else nf4.quantize(w)

    if not adapted:
        return MagellanoLM(SHAPE, seeded(3))
    made, settings = MagellanoLM(SHAPE, quantized), LoraConfig(rank=4)
    lora.attach(made, settings, lora.start(SHAPE, settings))
    return made


def trainer(tokens: Path, adapted: bool, recompute: str) -> Trainer:
    return Trainer(model(adapted), CONFIG.model_copy(update={"recompute": Recompute(recompute)}), tokens)


def measured(tokens: Path, adapted: bool, recompute: str) -> tuple[Trainer, int]:
    """A trainer and MLX's peak in its second step, without what other tests have left."""
    gc.collect()
    before = mx.get_active_memory()
    t = trainer(tokens, adapted, recompute)
    t.one_step()
    mx.reset_peak_memory()
    t.one_step()
    return t, mx.get_peak_memory() - before


@pytest.mark.parametrize("adapted", [True, False])
def test_the_training_is_the_same_either_way(tokens: Path, adapted: bool) -> None:
    again, keeping = (trainer(tokens, adapted, r) for r in ("always", "never"))
    assert not again.backprop.keeps
    assert keeping.backprop.keeps
    # On a GPU layers that are made again are compiled, with padded rows: sums round otherwise, and weights that train
    # in full carry that on from step to step.
    near = (10 if adapted else 300) if on_gpu() else 1
    for _ in range(3):
        a, b = again.one_step(), keeping.one_step()
        assert a.loss == pytest.approx(b.loss, abs=near * 1e-6)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=near * 1e-5)


@on_cpu
@pytest.mark.parametrize("adapted", [True, False])
def test_the_estimate_is_near_what_mlx_counts(tokens: Path, adapted: bool) -> None:
    keeping, kept = measured(tokens, adapted, "never")
    estimate = activations.held(keeping.model) + activations.kept(keeping.model.config, CONFIG.batch * T, 4)
    assert 0.75 * kept < estimate < 1.25 * kept
    del keeping
    assert measured(tokens, adapted, "always")[1] < 0.6 * kept, "which is what recomputing is for"


@on_cpu
def test_auto_keeps_what_fits_a_quarter_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made = model(adapted=True)
    needs = activations.held(made) + activations.kept(made.config, 4 * T, 4)
    for memory, recomputes in ((4 * needs, False), (4 * needs - 4, True), (None, True)):
        monkeypatch.setattr(activations, "memory_bytes", lambda memory=memory: memory)
        assert activations.recomputes(made, CONFIG, 4 * T) is recomputes
    monkeypatch.setattr(activations, "memory_bytes", lambda: 100 * needs)
    assert not activations.recomputes(made, CONFIG, 4 * T, limit_gib=(needs + 1) / 2**30)
    assert activations.recomputes(made, CONFIG, 4 * T, limit_gib=(needs - 1) / 2**30), "memory.limit_gib holds"


def test_held_counts_weights_in_4_bits_and_what_trains() -> None:
    made = model(adapted=True)
    trains = sum(a.size for a in lora.start(SHAPE, LoraConfig(rank=4)).values())
    packed = dense = 0
    for spec in layout.parameters(SHAPE):
        if spec.target is None:
            dense += 4 * spec.size
        else:
            experts, shape = (spec.shape[0], spec.shape[1:]) if len(spec.shape) == 3 else (1, spec.shape)
            packed += experts * nf4.quantize(mx.ones(shape)).nbytes
    assert activations.held(made) == packed + dense + 16 * trains
    before = activations.held(made)
    made.keep_small_dense()
    projections = [s for s in layout.parameters(SHAPE) if s.target in PROJECTIONS]
    assert activations.held(made) == before + 4 * sum(s.size for s in projections)
