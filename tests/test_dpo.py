"""DPO against the plain formula on documents one by one, what it teaches, resuming to the bit, micro-batches."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from magellano import backprop, dpo, pipeline
from magellano.backend import mx, tree_flatten, tree_unflatten
from magellano.backprop import Backprop
from magellano.data.shards import Batch, Shards
from magellano.dpo import Dpo, Pairs
from magellano.errors import InputError, Stopped
from magellano.fuse import without_adapters
from magellano.model import MagellanoLM
from magellano.names import Stage
from magellano.profile import LoraConfig, Profile, TrainConfig, load_profile
from magellano.trainer import run_to_end
from tests import models
from tests.pairs import END, document, make_tokens, rows
from tests.training import adapter_trainer, digest, silent

CONFIG = TrainConfig(
    steps=6, batch=2, lr=1e-2, warmup=2, checkpoint_every=2, log_every=1, compute="float32", objective="dpo",
    dpo_beta=0.5,
)  # fmt: skip
PAIRS = [([1, 2, 3], [4, 5], [6]), ([7], [8], [9, 10, 11, 12]), ([20, 21], [22, 23, 24], [25, 26])]


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return make_tokens(tmp_path / "tokens")


def batch_of(seq_len: int = 24) -> Batch:
    made = rows([document(*pair) for pair in PAIRS], seq_len)
    assert len(made.tokens) > 1, "pairs in more than one row"
    i32, f32 = np.int32, np.float32
    return Batch(made.tokens.astype(i32), made.targets.astype(i32), made.weights.astype(f32), made.reset)


def plain_loss(model: MagellanoLM, settings: Dpo) -> mx.array:
    """The sum over PAIRS by full logits, each document on its own; the reference as a constant."""

    def log_p(prompt: list[int], answer: list[int]) -> mx.array:
        logits = model(mx.array([[END, *prompt, *answer]]))[0]
        log_probabilities = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        targets = mx.array([*answer, END])
        return mx.take_along_axis(log_probabilities[len(prompt) :], targets[:, None], axis=-1).sum()

    total = mx.zeros(())
    for prompt, *answers in PAIRS:
        with without_adapters(model):
            reference = [mx.stop_gradient(log_p(prompt, answer)) for answer in answers]
        chosen, rejected = (log_p(prompt, a) - r for a, r in zip(answers, reference, strict=True))
        z, s = settings.beta * (chosen - rejected), settings.smoothing
        total = total - (1 - s) * mx.log(mx.sigmoid(z)) - s * mx.log(mx.sigmoid(-z))
    return total


@pytest.mark.parametrize("keeps", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_loss_and_gradients_are_those_of_the_plain_formula(keeps: bool, smoothing: float) -> None:
    model = models.quantized(models.TINY, LoraConfig(rank=4))
    settings, batch = Dpo(0.7, smoothing), batch_of()
    pairs = Pairs.of(settings, model, batch)
    tokens_BT, targets_BT, weights_BT, reset_BT = map(
        mx.array, (batch.tokens, batch.targets, batch.weights, batch.reset)
    )
    asked = backprop.Batch(tokens_BT, targets_BT, weights_BT, reset_BT, pairs)
    found = Backprop(model, keeps=keeps)(asked, 1.0)

    def loss(parameters: dict[str, mx.array]) -> mx.array:
        model.update(tree_unflatten(list(parameters.items())))
        return plain_loss(model, settings)

    parameters = dict(tree_flatten(model.trainable_parameters()))
    wanted, gradients = mx.value_and_grad(loss)(parameters)
    assert found.nll[0].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert set(found.gradients) == set(gradients)
    for name, gradient in gradients.items():
        scale = mx.abs(gradient).max().item()
        assert scale > 0, name
        assert mx.abs(found.gradients[name] - gradient).max().item() <= 2e-4 * scale, name


def test_preferences_are_learned(tokens: Path) -> None:
    trainer = adapter_trainer(tokens, CONFIG.model_copy(update={"steps": 12, "batch": 4}))
    before = trainer.held_out_loss()
    assert before == pytest.approx(np.log(2), rel=1e-6), "the start is the reference"
    steps = [trainer.one_step() for _ in range(12)]
    after = trainer.held_out_loss()
    assert trainer.preferred is not None
    assert after < 0.6 * before
    assert trainer.preferred.accuracy > 0.9
    assert trainer.preferred.margin > 1.0
    assert trainer.preferred.reward_chosen > trainer.preferred.reward_rejected
    assert np.mean([m.pair_accuracy for m in steps[-4:]]) > np.mean([m.pair_accuracy for m in steps[:4]])
    assert np.mean([m.loss for m in steps[-4:]]) < 0.5 * np.mean([m.loss for m in steps[:4]])


def test_a_resumed_run_ends_in_the_same_bits(tokens: Path, tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"accumulate": 2})
    whole = adapter_trainer(tokens, config)
    run_to_end(whole, tmp_path / "whole", silent)

    def stop_at_three(done: int, total: int, **facts: float | str) -> None:
        if done == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped, match="step 3 of 6"):
        run_to_end(adapter_trainer(tokens, config), tmp_path / "cut", stop_at_three)
    second = adapter_trainer(tokens, config)
    assert run_to_end(second, tmp_path / "cut", silent)["resumed_from"] == 3
    assert digest(second) == digest(whole)
    told = [[json.loads(line) for line in (tmp_path / n / "metrics.jsonl").read_text().splitlines()]
            for n in ("whole", "cut")]  # fmt: skip
    keys = ("step", "loss", "margin", "pair_accuracy", "reward_chosen", "held_out_loss", "held_out_accuracy")
    whole_lines, cut_lines = ([{k: line[k] for k in keys if k in line} for line in lines] for lines in told)
    assert cut_lines == whole_lines
    assert sum("margin" in line for line in whole_lines) == 6
    assert {"held_out_loss", "held_out_accuracy"} < whole_lines[-1].keys()


def test_accumulation_equals_one_large_batch(tokens: Path) -> None:
    """Rows hold different numbers of pairs; each pair must still weigh the same."""
    large = adapter_trainer(tokens, CONFIG.model_copy(update={"batch": 4}))
    small = adapter_trainer(tokens, CONFIG.model_copy(update={"batch": 1, "accumulate": 4}))
    for _ in range(3):
        a, b = large.one_step(), small.one_step()
        assert (a.loss, a.margin, a.grad_norm) == pytest.approx((b.loss, b.margin, b.grad_norm), rel=1e-3, abs=1e-5)
        assert a.pair_accuracy == b.pair_accuracy
    split = Shards(tokens, "train")
    assert len({dpo.count(split.batch([row])) for row in range(split.rows)}) > 1


def test_float16_with_loss_scaling_follows_float32(tokens: Path) -> None:
    half, full = (adapter_trainer(tokens, CONFIG.model_copy(update={"compute": c})) for c in ("float16", "float32"))
    for _ in range(3):
        assert half.one_step().loss == pytest.approx(full.one_step().loss, rel=2e-2)


def test_rejected_answers_are_left_out_of_other_measures(tokens: Path) -> None:
    split = dpo.held_out_split(tokens)
    assert isinstance(split, dpo.ChosenAlone)
    batch, whole = split.batch([0]), Shards(tokens, "held_out").batch([0])
    counted = batch.targets[batch.weights > 0]
    assert ((counted < 20) | (counted == END)).all(), "small numbers are chosen"
    left_out = whole.targets[(whole.weights > 0) & (batch.weights == 0)]
    assert ((left_out >= 20) & (left_out < 40) | (left_out == END)).all()
    assert (counted == END).sum() == (left_out == END).sum() == dpo.count(whole)


def test_tokens_and_objective_must_agree(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.objective sft is not for these tokens"):
        adapter_trainer(tokens, CONFIG.model_copy(update={"objective": "sft"}))
    with pytest.raises(InputError, match=r"train\.objective dpo is not for these tokens"):
        adapter_trainer(make_tokens(tmp_path / "other", pairs=False), CONFIG)


def profile(**overrides: object) -> Profile:
    return load_profile("demo", {"data.files": ["a.jsonl"], **overrides})


def test_profiles_in_which_data_and_objective_disagree_are_refused() -> None:
    both = {"data.format": "preference", "train.objective": "dpo"}
    assert profile(**both).data.pairs
    for key in both:
        with pytest.raises(InputError, match="belong together"):
            profile(**{key: both[key]})
    with pytest.raises(InputError, match="has no effect"):
        profile(**both, **{"loss.kind": "renyi"})
    with pytest.raises(InputError, match="starts away from the base"):
        profile(**both, **{"lora.init": "loftq"})
    with pytest.raises(InputError, match="a base cannot be trained on preferences"):
        profile(**{"pretrain.train.objective": "dpo"})
    sources = [{"name": n, "files": [n], "format": n} for n in ("preference", "text")]
    with pytest.raises(InputError, match="goes with no other"):
        profile(**both, **{"data.sources": sources, "data.files": []})


def test_keys_of_runs_without_preferences_stay() -> None:
    usual = pipeline.settings(Stage.TRAIN, profile())["train"]
    assert not {"objective", "dpo_beta", "dpo_label_smoothing"} & usual.keys()
    assert usual == pipeline.settings(Stage.TRAIN, profile(**{"train.dpo_beta": 0.3}))["train"]
    on = {"data.format": "preference", "train.objective": "dpo"}
    asked = pipeline.settings(Stage.TRAIN, profile(**on))["train"]
    assert asked == usual | {"objective": "dpo", "dpo_beta": 0.1, "dpo_label_smoothing": 0.0}
