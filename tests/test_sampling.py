"""Min-p and the repetition penalty against their definitions; sequences that draw on their own."""

from typing import Any

import numpy as np
import pytest

from magellano.backend import mx
from magellano.errors import InputError
from magellano.sampling import Sampling, also, choose, following, seen


def kept(logits: list[float], sampling: Sampling, draws: int = 600) -> list[int]:
    keys = mx.random.split(mx.random.key(0), draws)
    picked = choose(mx.broadcast_to(mx.array(logits), (draws, len(logits))), sampling, keys)
    return sorted(set(np.array(picked).tolist()))


@pytest.mark.parametrize(("p", "left"), [(0.0, [0, 1, 2, 3]), (0.2, [0, 2, 3]), (0.5, [0, 2]), (1.0, [2])])
def test_min_p_keeps_what_is_at_least_p_times_the_likeliest(p: float, left: list[int]):
    logits = np.log([0.3, 0.05, 0.5, 0.15]).tolist()
    assert kept(logits, Sampling(temperature=1.0, min_p=p)) == left


def test_min_p_is_of_the_distribution_that_temperature_makes():
    """At temperature 2 a share of 1/16 becomes one of 1/4."""
    assert kept(np.log([16.0, 1.0]).tolist(), Sampling(temperature=1.0, min_p=0.2)) == [0]
    assert kept(np.log([16.0, 1.0]).tolist(), Sampling(temperature=2.0, min_p=0.2)) == [0, 1]


def test_a_repetition_penalty_weakens_what_was_there():
    logits = mx.array([[2.0, 1.5, -1.0], [2.0, 1.5, -1.0], [-0.5, -9.0, -0.6]])
    had = seen([[], [0], [0, 2]], 3)
    key = mx.random.key(0)
    assert choose(logits, Sampling(repetition_penalty=2.0), key, had).tolist() == [0, 1, 0]
    assert choose(logits, Sampling(repetition_penalty=1.0), key, had).tolist() == [0, 0, 0]
    # 2 -> 2 / 4 = 0.5, 1.5 stays; -0.5 -> -2, -0.6 -> -2.4: a negative one falls too
    assert choose(logits, Sampling(repetition_penalty=4.0), key, seen([[], [0], [0]], 3)).tolist() == [0, 1, 2]


def test_tokens_are_remembered_for_each_sequence():
    had = also(seen([[1], []], 4), mx.array([3, 0]))
    assert had.tolist() == [[False, True, False, True], [True, False, False, False]]


def test_a_sequence_draws_the_same_beside_others_as_alone():
    logits = mx.array(np.random.default_rng(0).normal(size=(3, 50)).astype(np.float32))
    sampling = Sampling(temperature=1.0, seed=7)
    keys = sampling.keys(3)
    for _ in range(4):
        keys, now = following(keys)
        together = choose(logits, sampling, now).tolist()
        alone = [choose(logits[n : n + 1], sampling, now[n : n + 1]).item() for n in range(3)]
        assert together == alone
    assert mx.array_equal(sampling.keys(2, number=1), sampling.keys(3)[1:]).item()


def test_sequences_draw_differently():
    logits = mx.zeros((4, 1000))
    assert len(set(choose(logits, Sampling(temperature=1.0), Sampling(seed=1).keys(4)).tolist())) == 4


@pytest.mark.parametrize(
    "wrong",
    [{"min_p": -0.1}, {"min_p": 1.1}, {"repetition_penalty": 0.0}, {"seed": -1}, {"temperature": float("nan")}],
)
def test_impossible_settings_are_refused(wrong: dict[str, Any]):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)
