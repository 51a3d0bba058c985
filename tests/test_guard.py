"""When a training counts as gone wrong, and that it goes back and past the batches that did it."""

import json
import math
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magellano import lora, state
from magellano.backend import mx
from magellano.backprop import Backprop, Outcome
from magellano.data import shards
from magellano.errors import Diverged, ExitCode, Stopped
from magellano.guard import AT_LEAST, HALVINGS, ROLLBACKS, WINDOW, Guard, Trouble, all_finite
from magellano.names import Compute
from magellano.profile import TrainConfig
from magellano.trainer import Trainer, run_to_end
from tests.training import CONFIG, adapter_trainer, digest, make_tokens, silent

LONG = CONFIG.model_copy(update={"steps": 16, "checkpoint_every": 4})


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return make_tokens(tmp_path / "tokens")


# what is judged


def judged(guard: Guard, *losses: float, can_overflow: bool = False) -> list[Trouble | None]:
    return [guard.judge(step, loss, math.isfinite(loss), can_overflow) for step, loss in enumerate(losses, 1)]


def test_three_bad_steps_without_a_good_one_between() -> None:
    nan = math.nan
    assert judged(Guard(), nan, nan, 5.0, nan, nan, 5.0) == [None] * 6
    *before, trouble = judged(Guard(), 5.0, nan, math.inf, nan)
    assert before == [None] * 3
    assert trouble is not None
    assert trouble.steps == (2, 3, 4)


def test_overflows_of_the_loss_scale_count_from_its_floor_or_after_ten() -> None:
    """The loss is finite, the gradient is not."""
    guard = Guard()
    found = [guard.judge(step, 5.0, False, True) for step in range(1, HALVINGS + 4)]
    assert found[:-1] == [None] * (HALVINGS + 2)
    assert found[-1] is not None
    assert found[-1].steps == (11, 12, 13)
    guard = Guard()
    found = [guard.judge(step, 5.0, False, step <= 4) for step in range(1, 8)]
    assert found[:-1] == [None] * 6
    assert found[-1] is not None
    assert found[-1].steps == (5, 6, 7), "the steps at the floor"
    assert judged(Guard(), *[math.nan] * 3, can_overflow=True)[-1] is not None, "no scale makes the loss NaN"


def test_a_loss_that_jumps_tenfold() -> None:
    assert judged(Guard(), *[3.0] * (AT_LEAST - 1), 1e6)[-1] is None, "too few to tell"
    assert judged(Guard(), *[3.0] * AT_LEAST, 29.9)[-1] is None
    trouble = judged(Guard(), *[3.0] * AT_LEAST, 30.1)[-1]
    assert trouble is not None
    assert (trouble.why, trouble.steps) == ("loss 30.1 is over 10 times the median 3", (AT_LEAST + 1,))
    assert judged(Guard(), *[0.01] * AT_LEAST, 0.9)[-1] is None, "small losses jump"
    assert judged(Guard(), *[0.01] * AT_LEAST, 1.1)[-1] is not None
    assert judged(Guard(), *[50.0] * 40, *[3.0] * WINDOW, 31.0)[-1] is not None, "of the last ones"
    guard = Guard()
    judged(guard, *[3.0] * AT_LEAST, 31.0)
    assert guard.losses == [3.0] * AT_LEAST, "one that jumped is no measure"
    assert guard.judge(20, None, True, False) is None
    assert guard.losses == [3.0] * AT_LEAST, "nor one of no tokens"


def test_the_batch_before_is_blamed_where_trouble_returns_right_behind() -> None:
    guard = Guard()
    assert guard.pass_over(Trouble("", (37, 38, 39)), lambda step: [step]) == 36
    assert guard.pass_over(Trouble("", (40,)), lambda step: [step]) == 35
    assert guard.passed == [36, 37, 38, 39, 40]
    assert guard.pass_over(Trouble("", (40,)), lambda step: [step]) == 34, "the state behind a passed one, when saved"
    assert guard.pass_over(Trouble("", (50,)), lambda step: [step]) == 49
    assert guard.passed == [35, 36, 37, 38, 39, 40, 50]
    assert guard.pass_over(Trouble("", (42,)), lambda step: [step]) == 41
    assert guard.pass_over(Trouble("", (43,)), lambda step: [step]) == 40, (
        "41 is behind others, but was not to blame yet"
    )
    assert guard.passed == [35, 36, 37, 38, 39, 40, 41, 42, 43, 50]
    assert guard.rollbacks[1] == {
        "step": 40, "why": "", "passed": [{"step": 36, "rows": [36]}, {"step": 40, "rows": [40]}],
    }  # fmt: skip


def test_no_more_than_so_many_times() -> None:
    guard = Guard()
    for step in range(10, 10 * ROLLBACKS + 10, 10):
        guard.pass_over(Trouble("why", (step,)), lambda step: [])
    with pytest.raises(
        Diverged, match=r"step 99: why, and the training was set back 8 times before; lower train.lr"
    ) as e:
        guard.pass_over(Trouble("why", (99,)), lambda step: [])
    assert e.value.exit_code == ExitCode.FAILED
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
def test_the_finite_are_told_by_their_bits(dtype: mx.Dtype) -> None:
    largest = {mx.float32: 3.4028235e38, mx.float16: 65504.0, mx.bfloat16: 3.3895e38}[dtype]
    good = [
        mx.array([0.0, -0.0, 1.0, largest, -largest, 1e-7], dtype=dtype),
        mx.zeros((0,)),
        mx.array(7),
        mx.array(1.5),
    ]
    assert np.isfinite(np.array(good[0].astype(mx.float32))).all()
    assert all_finite(good)
    for odd in (math.inf, -math.inf, math.nan):
        for shape in ((), (3, 5)):
            assert not all_finite([*good, mx.full(shape, odd, dtype=dtype)]), (odd, shape)
        many = np.zeros((4, 100), np.float32)
        many[2, 77] = odd
        assert not all_finite([mx.array(many).astype(dtype).T])


# what follows


Change = Callable[[Outcome], Outcome]


def poisoned(trainer: Trainer, steps: tuple[int, ...], change: Change) -> Trainer:
    """`trainer` with the outcome of its backward pass changed in these steps, however often they are taken."""

    class Poisoned(Backprop):
        def __call__(self, *args: Any) -> Outcome:
            found = super().__call__(*args)
            return change(found) if trainer.step + 1 in steps else found

    trainer.backprop.__class__ = Poisoned
    return trainer


def nan_gradient(found: Outcome) -> Outcome:
    gradients = {name: g * float("nan") for name, g in found.gradients.items()}
    return replace(found, gradients=gradients, squares=found.squares * float("nan"))


def high_loss(found: Outcome) -> Outcome:
    return replace(found, nll=found.nll * 20)


def without_batches(tokens: Path, config: TrainConfig, steps: tuple[int, ...]) -> Trainer:
    """A training in which the batches of these steps were never seen, by hand."""
    trainer = adapter_trainer(tokens, config)
    while trainer.step < config.steps:
        if trainer.step + 1 in steps:
            trainer.step += 1
            trainer._follow_schedule()
        else:
            trainer.one_step()
    return trainer


def lines(work: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    ("steps", "change", "why"),
    [
        ((6, 7, 8), nan_gradient, "loss or gradient was not finite in 3 steps in a row"),
        ((11,), high_loss, "is over 10 times the median"),
        ((12,), high_loss, "is over 10 times the median"),  # a step after which a checkpoint is due
        ((16,), high_loss, "is over 10 times the median"),  # the last one
        ((2, 3, 4), nan_gradient, "not finite in 3 steps in a row"),  # before the first checkpoint but that of step 0
    ],
)
def test_a_training_gone_wrong_ends_as_if_it_had_never_seen_the_batches(
    tokens: Path, tmp_path: Path, steps: tuple[int, ...], change: Change, why: str
) -> None:
    trainer = poisoned(adapter_trainer(tokens, LONG), steps, change)
    facts = run_to_end(trainer, tmp_path / "work", silent)
    assert digest(trainer) == digest(without_batches(tokens, LONG, steps))
    assert trainer.guard.passed == list(steps)
    (event,) = facts["rollbacks"]
    assert event["step"] == steps[-1]
    assert why in event["why"]
    rows = [[int(row) for row in shards.indices((step - 1) * 2, 2, 13, CONFIG.seed)] for step in steps]
    assert event["passed"] == [{"step": s, "rows": r} for s, r in zip(steps, rows, strict=True)]
    assert facts["skipped"] == len(steps)
    told = lines(tmp_path / "work")
    assert [line["rollback"]["passed"] for line in told if "rollback" in line] == [event["passed"]]
    assert sorted(line["step"] for line in told if "lr" in line) == list(range(1, 17)), "each step once"
    assert [line["step"] for line in told if line.get("skipped")] == list(steps)
    assert not any("loss" in line for line in told if line.get("skipped"))


def test_a_single_step_that_is_not_finite_is_no_reason_to_go_back(tokens: Path, tmp_path: Path) -> None:
    trainer = poisoned(adapter_trainer(tokens, LONG), (6, 7, 10), nan_gradient)
    facts = run_to_end(trainer, tmp_path / "work", silent)
    assert (facts["rollbacks"], facts["skipped"]) == ([], 3)
    assert digest(trainer) == digest(without_batches(tokens, LONG, (6, 7, 10)))


def test_checkpoints_behind_the_one_that_it_goes_back_to_are_forgotten(tokens: Path, tmp_path: Path) -> None:
    """The update of step 12 is blamed at last, after which there was a checkpoint."""
    trainer = poisoned(adapter_trainer(tokens, LONG), (13, 14), high_loss)
    there = []

    def look(done: int, total: int, **facts: float | str) -> None:
        there.append((done, [path.name[-2:] for path in state.by_step(tmp_path / "work")]))

    facts = run_to_end(trainer, tmp_path / "work", look)
    assert [[batch["step"] for batch in event["passed"]] for event in facts["rollbacks"]] == [[13], [12, 14]]
    assert [seen for done, seen in there if done == 9] == [["04", "08"], ["08"]]
    assert [seen for done, seen in there if done == 16] == [["08", "15"]]
    assert digest(trainer) == digest(without_batches(tokens, LONG, (12, 13, 14)))


def broken(trainer: Trainer, after: int) -> Trainer:
    """`trainer` whose update of step `after` makes a weight infinite: the steps behind it have no finite loss."""
    step = trainer.one_step

    def one_step() -> Any:
        metrics = step()
        if trainer.step == after and not metrics.skipped:
            target = lora.find(trainer.model, "backbone.layers.0.mixer.in_proj")
            target.lora_a = mx.full(target.lora_a.shape, float("inf"))
        return metrics

    trainer.one_step = one_step  # type: ignore[method-assign]
    return trainer


def test_an_update_that_broke_the_weights_is_found_behind_the_batches_that_showed_it(
    tokens: Path, tmp_path: Path
) -> None:
    trainer = broken(adapter_trainer(tokens, LONG), after=6)
    facts = run_to_end(trainer, tmp_path / "work", silent)
    blamed = [[batch["step"] for batch in event["passed"]] for event in facts["rollbacks"]]
    assert blamed == [[7, 8, 9], [6, 10, 11, 12]]
    assert digest(trainer) == digest(without_batches(tokens, LONG, tuple(range(6, 13))))


def test_weights_that_are_not_finite_when_they_are_to_be_saved_are_not(tokens: Path, tmp_path: Path) -> None:
    trainer = broken(adapter_trainer(tokens, LONG), after=8)
    facts = run_to_end(trainer, tmp_path / "work", silent)
    (event,) = facts["rollbacks"]
    assert event["why"] == "the state after step 8 is not finite"
    assert [batch["step"] for batch in event["passed"]] == [8]
    assert digest(trainer) == digest(without_batches(tokens, LONG, (8,)))


def test_a_learning_rate_that_destroys_the_weights_ends_with_one_line(tokens: Path, tmp_path: Path) -> None:
    config = LONG.model_copy(update={"steps": 90, "lr": 1e30, "warmup": 0, "checkpoint_every": 10})
    with pytest.raises(Diverged, match=r"^step \d+: .*set back 8 times before; lower train.lr") as e:
        run_to_end(adapter_trainer(tokens, config), tmp_path / "work", silent)
    assert "\n" not in str(e.value)
    found = state.latest(tmp_path / "work")
    assert found is not None
    for value in (*found.parameters.values(), *found.optimizer.values()):
        assert np.isfinite(np.array(value)).all()


def test_a_gradient_that_always_overflows_goes_back_after_the_scale_had_its_chance(
    tokens: Path, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"steps": 40, "checkpoint_every": 4, "compute": Compute.FLOAT16})
    bad = tuple(range(8, 8 + HALVINGS + 3))
    trainer = poisoned(adapter_trainer(tokens, config), bad, nan_gradient)
    facts = run_to_end(trainer, tmp_path / "work", silent)
    (event,) = facts["rollbacks"]
    assert [batch["step"] for batch in event["passed"]] == list(bad[-3:])
    assert facts["skipped"] == len(bad)
    assert trainer.scale.value == 2.0**15 / 2**HALVINGS, "10 halvings, not 13"


@pytest.mark.parametrize("at", [5, 9, 10, 11])
def test_a_run_that_is_stopped_goes_back_likewise(tokens: Path, tmp_path: Path, at: int) -> None:
    """Stopped before, between and behind the steps that went wrong, and in the moment when it would be set back."""
    steps = (9, 10, 11)
    whole = poisoned(adapter_trainer(tokens, LONG), steps, nan_gradient)
    facts = run_to_end(whole, tmp_path / "whole", silent)
    first = poisoned(adapter_trainer(tokens, LONG), steps, nan_gradient)

    def stop(done: int, total: int, **facts: float | str) -> None:
        if done == at:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Stopped, match="is not saved" if at == 11 else "the state is saved"):
        run_to_end(first, tmp_path / "cut", stop)
    second = poisoned(adapter_trainer(tokens, LONG), steps, nan_gradient)
    again = run_to_end(second, tmp_path / "cut", silent)
    assert again["resumed_from"] == {5: 5, 9: 9, 10: 10, 11: 8}[at]
    assert again["rollbacks"] == facts["rollbacks"] != []
    assert digest(second) == digest(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("update", "steps"),
    [
        ({}, ()),
        ({"compute": Compute.FLOAT16, "state": "float16", "accumulate": 2}, ()),
        ({}, (9, 10, 11)),
    ],
    ids=["plain", "float16", "rollback"],
)
def test_evaluating_more_or_less_often_changes_nothing(
    tokens: Path, tmp_path: Path, update: dict[str, Any], steps: tuple[int, ...]
) -> None:
    """Though evaluations add checkpoints, which a training that goes wrong is set back to."""
    ends, taken = set(), []
    for every in (0, 1, 5):
        config = TrainConfig(**(LONG.model_dump() | update | {"evaluate_every": every}))
        trainer = poisoned(adapter_trainer(tokens, config), steps, nan_gradient)
        facts = run_to_end(trainer, tmp_path / str(every), silent)
        ends.add((digest(trainer), json.dumps(facts["rollbacks"]), facts["skipped"]))
        taken.append(sum("held_out_loss" in line for line in lines(tmp_path / str(every))))
    assert taken == [1, 16, 4]
    assert len(ends) == 1


def test_a_stop_breaks_an_evaluation_off_and_the_next_start_makes_up_for_it(tokens: Path, tmp_path: Path) -> None:
    config = LONG.model_copy(update={"evaluate_every": 4})
    trainer = adapter_trainer(tokens, config)

    def stop(done: int, total: int, **facts: float | str) -> None:
        if done == 8:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(Stopped, match="step 8 of 16"):
        run_to_end(trainer, tmp_path / "cut", stop)
    assert [line["step"] for line in lines(tmp_path / "cut") if "held_out_loss" in line] == [4]
    whole, second = adapter_trainer(tokens, config), adapter_trainer(tokens, config)
    run_to_end(whole, tmp_path / "whole", silent)
    run_to_end(second, tmp_path / "cut", silent)
    told = [[line for line in lines(tmp_path / name) if "held_out_loss" in line] for name in ("whole", "cut")]
    assert [line["step"] for line in told[0]] == [4, 8, 12, 16]
    assert told[0] == told[1]
    lowest = min(told[0], key=lambda line: line["held_out_loss"])
    best = state.best(tmp_path / "cut")
    assert best == (tmp_path / "cut" / f"step-{lowest['step']:09d}", lowest["held_out_loss"])
