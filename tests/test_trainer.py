"""Accumulation against one large batch, resuming to the bit, float16 loss scaling, all-masked batches."""

import dataclasses
import json
import signal
from pathlib import Path

import numpy as np
import pytest

from magellano import backprop, lora, state
from magellano import trainer as trainer_module
from magellano.backend import mx, on_gpu
from magellano.backprop import Batch
from magellano.errors import Stopped
from magellano.names import Compute, Recompute, StateDtype
from magellano.ops import host
from magellano.profile import LossConfig
from magellano.trainer import Trainer, run_to_end
from tests.training import ADAPTERS, CONFIG, adapter_trainer, digest, make_tokens, silent


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return make_tokens(tmp_path / "tokens")


def test_accumulation_equals_one_large_batch(tokens: Path) -> None:
    """Micro-batches hold different numbers of target tokens; each token must still weigh the same."""
    large = adapter_trainer(tokens, CONFIG.model_copy(update={"batch": 6}))
    small = adapter_trainer(tokens, CONFIG.model_copy(update={"batch": 2, "accumulate": 3}))
    for _ in range(4):
        a, b = large.one_step(), small.one_step()
        assert a.loss == pytest.approx(b.loss, rel=1e-5)
        assert a.grad_norm == pytest.approx(b.grad_norm, rel=1e-4)
        assert a.tokens == b.tokens
    other = small.tensors()
    for name, value in large.tensors().items():
        assert mx.allclose(value, other[name], rtol=1e-3, atol=1e-5).item(), name


def test_the_loss_falls(tokens: Path) -> None:
    trainer = adapter_trainer(tokens, CONFIG.model_copy(update={"steps": 30, "batch": 8, "lr": 2e-2}))
    losses = [trainer.one_step().loss for _ in range(30)]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])


def test_with_lora_plus_b_alone_steps_wider(tokens: Path) -> None:
    """A first step of Adam is as wide as the rate, whatever the gradient."""
    once, wide, same = (
        adapter_trainer(tokens, adapters=ADAPTERS.model_copy(update={"plus": plus})) for plus in (1.0, 8.0, 1.0)
    )
    start = once.tensors()
    for trainer in (once, wide, same):
        trainer.one_step()
    assert digest(once) == digest(same)
    for name, value in wide.tensors().items():
        moved, wanted = (np.array(t[name] - start[name], np.float64) for t in ({name: value}, once.tensors()))
        np.testing.assert_allclose(moved, wanted * (8.0 if name.endswith("lora_b") else 1.0), rtol=1e-4, atol=1e-9)
        assert np.abs(moved).max() > 0 or name.endswith("lora_a"), "B is zero at first, and A so without a gradient"


@pytest.mark.parametrize("plus", [1.0, 4.0])
@pytest.mark.parametrize("states", list(StateDtype))
def test_a_resumed_run_ends_in_the_same_bits(tokens: Path, tmp_path: Path, states: StateDtype, plus: float) -> None:
    config, adapters = CONFIG.model_copy(update={"state": states}), ADAPTERS.model_copy(update={"plus": plus})
    whole = adapter_trainer(tokens, config, adapters=adapters)
    run_to_end(whole, tmp_path / "whole", silent)
    first = adapter_trainer(tokens, config, adapters=adapters)

    def stop_at_three(done: int, total: int, **facts: float | str) -> None:
        if done == 3:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)  # a second signal changes nothing

    with pytest.raises(Stopped, match="step 3 of 6"):
        run_to_end(first, tmp_path / "cut", stop_at_three)
    second = adapter_trainer(tokens, config, adapters=adapters)
    facts = run_to_end(second, tmp_path / "cut", silent)
    assert facts["resumed_from"] == 3
    assert digest(second) == digest(whole)
    lines = (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
    kinds = {kind: [json.loads(line)["step"] for line in lines if f'"{kind}"' in line]
             for kind in ("loss", "experts", "held_out_loss")}  # fmt: skip
    assert kinds == {"loss": [*range(1, 7)], "experts": [*range(1, 7)], "held_out_loss": [6]}, "none twice"
    assert len(lines) == 13


def test_a_checkpoint_holds_what_the_experts_rooms_are_for(tokens: Path, tmp_path: Path) -> None:
    """Which only a GPU's training has: a run that goes on, or is set back, has the rooms that it had there."""
    whole, second = adapter_trainer(tokens), adapter_trainer(tokens)
    made, first = whole.backprop, {3: [26, 21, 17]}
    made._compiles = second.backprop._compiles = True  # as on a GPU
    made.seen = [100, []]
    assert not made._hold(first)
    assert made._hold({3: [30, 20, 14]}), "with a fifth to spare"
    rooms = dict(made._rooms)
    whole.save(tmp_path)
    assert not made._hold({3: [80, 10, 10]})
    assert made._rooms != rooms
    assert second.resume(tmp_path)
    whole._restore(state.latest(tmp_path), tmp_path)
    for one in (second.backprop, made):
        assert (one._rooms, one.loads, one._tokens) == (rooms, first, 100)


@pytest.mark.skipif(on_gpu(), reason="a GPU's training has rooms")
def test_a_cpu_takes_no_rooms_on(tokens: Path, tmp_path: Path) -> None:
    second, other = adapter_trainer(tokens), adapter_trainer(tokens)
    second.backprop._compiles = True  # as on a GPU
    second.backprop.seen = [100, [[3, [26, 21, 17]]]]
    second.save(tmp_path)
    assert other.resume(tmp_path)
    assert other.backprop.loads == other.backprop._rooms == {}, "a CPU's passes may not see what a room does not hold"
    other.one_step()
    other.save(tmp_path)
    assert "rooms" not in state.latest(tmp_path).facts
    assert second.resume(tmp_path)
    assert second.backprop._rooms == {}


def test_evaluating_more_often_changes_nothing(tokens: Path, tmp_path: Path) -> None:
    digests = set()
    for every in (0, 1):
        trainer = adapter_trainer(tokens, CONFIG.model_copy(update={"evaluate_every": every}))
        run_to_end(trainer, tmp_path / str(every), silent)
        digests.add(digest(trainer))
    assert len(digests) == 1


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(
    tokens: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = adapter_trainer(tokens)
    for _ in range(2):
        trainer.one_step()
        trainer.save(tmp_path)
    path = tmp_path / "step-000000002" / state.PARAMETERS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    found = state.latest(tmp_path)
    assert found is not None
    assert found.facts["step"] == 1
    assert "is damaged" in caplog.text
    assert not (tmp_path / "step-000000002").exists()


def test_the_last_two_checkpoints_stay(tokens: Path, tmp_path: Path) -> None:
    trainer = adapter_trainer(tokens)
    for _ in range(4):
        trainer.one_step()
        trainer.save(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "tokens") == ["step-000000003", "step-000000004"]


@pytest.mark.skipif(on_gpu(), reason="GPUs allocate cheaply")
def test_steps_write_over_the_states_until_somebody_reads_them(tokens: Path) -> None:
    trainer = adapter_trainer(tokens)

    def places() -> list[int]:
        moments = [group.moments for group in trainer.optimizer._groups]
        return [host.view(a).ctypes.data for m in moments for a in (m.m, m.s)]

    trainer.one_step()
    first = places()
    for _ in range(3):
        trainer.one_step()
        assert places() == first
    read = trainer.optimizer.state
    before = {name: np.array(a) for name, a in read.items()}
    trainer.one_step()
    assert not set(places()) & set(first)
    for name, value in before.items():
        np.testing.assert_array_equal(read[name], value, name)
        assert (np.array(trainer.optimizer.state[name]) != value).any(), name


def test_a_gradient_that_is_not_finite_is_skipped_and_halves_the_scale(tokens: Path) -> None:
    trainer = adapter_trainer(tokens)
    trainer.scale.dynamic, trainer.scale.value = True, 4.0
    before = digest(trainer)
    path = "backbone.layers.0.mixer.in_proj"
    poisoned = lora.find(trainer.model, path)
    good = poisoned.lora_a
    poisoned.lora_a = mx.full(good.shape, float("nan"))
    metrics = trainer.one_step()
    poisoned.lora_a = good
    assert metrics.skipped
    assert trainer.scale.value == 2.0
    assert digest(trainer) == before


def test_float16_with_loss_scaling_follows_float32(tokens: Path) -> None:
    half = adapter_trainer(tokens, CONFIG.model_copy(update={"compute": Compute.FLOAT16}))
    assert half.scale.dynamic
    full = adapter_trainer(tokens)
    for _ in range(3):
        a, b = half.one_step(), full.one_step()
        assert not a.skipped
        assert a.loss == pytest.approx(b.loss, rel=5e-3)


def test_a_resumed_float16_run_continues_with_its_loss_scale(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A first scale that overflows is halved; three good steps double it, and those before the checkpoint count."""
    monkeypatch.setattr(trainer_module, "SCALE_START", 2.0**30)
    monkeypatch.setattr(trainer_module, "SCALE_GROWTH_STEPS", 3)
    config = CONFIG.model_copy(update={"compute": Compute.FLOAT16, "steps": 40})
    whole, first = adapter_trainer(tokens, config), adapter_trainer(tokens, config)
    while not (whole.scale.value < 2.0**30 and whole.scale.good == 2):
        whole.one_step()
        first.one_step()
        assert whole.step < 30, "it settles"
    first.save(tmp_path)
    found = state.latest(tmp_path)
    assert found is not None
    assert found.facts["loss_scale"] == {"value": whole.scale.value, "good": 2, "dynamic": True}
    second = adapter_trainer(tokens, config)
    assert second.resume(tmp_path)
    assert second.scale == first.scale
    scales = []
    for _ in range(4):
        assert second.one_step().loss == whole.one_step().loss
        assert second.scale == whole.scale
        scales.append(second.scale.value)
    assert scales[0] == 2 * first.scale.value, "the third good step in a row"
    assert digest(second) == digest(whole)


@pytest.mark.parametrize("recompute", ["always", "never"])
@pytest.mark.parametrize("entropy", [None, LossConfig(kind="renyi", alpha=2.0, beta=0.5)])
def test_rows_that_do_not_count_need_no_head(
    tokens: Path, monkeypatch: pytest.MonkeyPatch, recompute: str, entropy: LossConfig | None
) -> None:
    """The same loss and gradient whether the head sees all rows or, on a CPU, the counted ones alone."""
    trainer = adapter_trainer(tokens, CONFIG.model_copy(update={"recompute": Recompute(recompute)}), entropy)
    rows = trainer.train.batch(range(4))
    counted = np.count_nonzero(rows.weights)
    assert 0 < counted < rows.weights.size
    batch = Batch(*(mx.array(a) for a in (rows.tokens, rows.targets, rows.weights, rows.reset)))
    seen, head = [], trainer.model.backbone.embeddings.head
    monkeypatch.setattr(
        type(trainer.model.backbone.embeddings), "head", lambda self, h: (seen.append(h.shape[0]), head(h))[1]
    )
    some = trainer.backprop(batch, 0.5)
    monkeypatch.setattr(backprop, "_counted", lambda weights: None)
    every = trainer.backprop(batch, 0.5)
    assert seen == [rows.weights.size if on_gpu() else counted, rows.weights.size]
    assert some.nll.item() == pytest.approx(every.nll.item(), rel=1e-6)
    for name, value in every.gradients.items():
        assert mx.allclose(some.gradients[name], value, rtol=1e-4, atol=1e-5).item(), name


def test_an_all_masked_batch_counts_nothing(tokens: Path) -> None:
    trainer = adapter_trainer(tokens)
    batch = trainer.train.batch
    trainer.train.batch = lambda i: dataclasses.replace(batch(i), weights=np.zeros((len(i), 16), np.float32))  # type: ignore[method-assign]
    metrics = trainer.one_step()
    assert metrics.loss == 0.0
    assert metrics.grad_norm == 0.0
    assert not metrics.skipped


def losses_and_trainer(tokens: Path, loss: LossConfig | None, steps: int = 30) -> tuple[list[float], Trainer]:
    config = CONFIG.model_copy(update={"steps": steps, "batch": 8, "lr": 2e-2})
    trainer = adapter_trainer(tokens, config, loss)
    return [trainer.one_step().loss for _ in range(steps)], trainer


def entropies(trainer: Trainer) -> float:
    """Mean Shannon entropy of the model's predictions on the first training rows, in nats."""
    batch = trainer.train.batch(np.arange(8))
    logits = np.array(trainer.model(mx.array(batch.tokens), mx.array(batch.reset)), np.float64)
    log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return float(-(np.exp(log_p) * log_p).sum(axis=-1).mean())


def test_renyi_trains_and_keeps_the_predictions_less_sure(tokens: Path) -> None:
    """The reported loss is plain cross-entropy: it starts where the plain run's does, and it falls too."""
    plain, plainly = losses_and_trainer(tokens, LossConfig())
    losses, trainer = losses_and_trainer(tokens, LossConfig(kind="renyi", alpha=2.0, beta=0.5))
    assert losses[0] == plain[0]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    assert digest(trainer) != digest(plainly)
    assert entropies(trainer) > entropies(plainly) + 0.1


def test_renyi_of_weight_0_is_cross_entropy_to_the_bit(tokens: Path) -> None:
    runs = [losses_and_trainer(tokens, loss, 4) for loss in (None, LossConfig(kind="renyi", beta=0.0), LossConfig())]
    assert len({tuple(losses) for losses, _ in runs}) == 1
    assert len({digest(trainer) for _, trainer in runs}) == 1


def test_renyi_near_order_1_trains_as_shannon(tokens: Path) -> None:
    trained = {
        alpha: losses_and_trainer(tokens, LossConfig(kind="renyi", alpha=alpha, beta=0.5), 10)
        for alpha in (1.0, 1.0 + 1e-4, 2.0)
    }
    shannon, near, far = (np.array(trained[alpha][0]) for alpha in trained)
    assert np.abs(near - shannon).max() < 1e-3
    assert np.abs(far - shannon).max() > 1e-2
