"""Generation: each way of choosing a token against its definition, the loop against the full forward of a model."""

import math
from typing import Any

import numpy as np
import pytest

from magellano.backend import mx
from magellano.errors import InputError
from magellano.generate import PROMPT_CHUNK, Sampling, choose, generate, text
from magellano.model import MagellanoLM, seeded
from magellano.profile import ModelConfig

END = 60
TINY = ModelConfig(d_model=16, n_layers=4, n_experts=4, d_ff=24, d_state=4, dt_rank=3, vocab_size=257)


@pytest.fixture(scope="module")
def model() -> MagellanoLM:
    return MagellanoLM(TINY, seeded(3))


class Scripted:
    """A model that always wants the token after the last one, and remembers what it was fed."""

    def __init__(self, vocabulary: int = 64):
        self.vocabulary, self.fed = vocabulary, []

    def initial_state(self, batch: int) -> Any:
        return mx.zeros((batch,))

    def step(self, tokens_BT: mx.array, state: Any) -> tuple[mx.array, Any]:
        self.fed += tokens_BT[0].tolist()
        wanted = (np.array(tokens_BT) + 1) % self.vocabulary
        return mx.array(np.eye(self.vocabulary, dtype=np.float32)[wanted]), state + 1


def test_document_starts_with_end_of_text_and_stops_at_it():
    scripted = Scripted()
    assert list(generate(scripted, [7, END - 3], END, 10)) == [END - 2, END - 1]
    assert scripted.fed == [END, 7, END - 3, END - 2, END - 1]


def test_stops_at_max_tokens_without_a_step_too_many():
    scripted = Scripted()
    assert list(generate(scripted, [1], END, 3)) == [2, 3, 4]
    assert scripted.fed == [END, 1, 2, 3]


def test_an_empty_prompt_generates_from_the_start_of_a_document():
    assert list(generate(Scripted(), [], END, 2)) == [END + 1, END + 2]


def test_greedy_is_the_full_forward(model: MagellanoLM):
    """Prompt longer than a chunk, so that the state crosses from chunk to chunk."""
    prompt = np.random.default_rng(0).integers(0, 256, PROMPT_CHUNK + 20).tolist()
    made = list(generate(model, prompt, 256, 5))
    row = [256, *prompt]
    for token in made:
        assert int(mx.argmax(model(mx.array([row]))[0, -1]).item()) == token
        row.append(token)
    assert made


def test_same_seed_same_tokens_other_seed_other_tokens(model: MagellanoLM):
    def draw(seed: int) -> list[int]:
        return list(generate(model, [1, 2, 3], 256, 12, Sampling(temperature=1.0, seed=seed)))

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in range(4)}) == 4


def frequencies(logits: list[float], sampling: Sampling, draws: int = 2000) -> np.ndarray:
    keys = mx.random.split(mx.random.key(0), draws)
    picked = [choose(mx.array(logits), sampling, keys[n]) for n in range(draws)]
    return np.bincount(np.array(mx.stack(picked)), minlength=len(logits)) / draws


def test_temperature_gives_the_softmax():
    logits = [0.0, 1.0, 2.0, -1.0]
    for temperature in (0.5, 1.0, 2.0):
        expected = np.exp(np.array(logits) / temperature)
        expected /= expected.sum()
        # 2000 draws: five standard deviations of the largest share are 0.056
        np.testing.assert_allclose(frequencies(logits, Sampling(temperature=temperature)), expected, atol=0.056)


def test_top_k_leaves_the_k_likeliest_in_their_proportion():
    got = frequencies([1.0, 3.0, 2.0, 0.0, -4.0], Sampling(temperature=1.0, top_k=2))
    assert got[[0, 3, 4]].sum() == 0
    assert got[1] == pytest.approx(1 / (1 + math.exp(-1)), abs=0.056)


@pytest.mark.parametrize(
    ("p", "kept"), [(0.05, [2]), (0.5, [2]), (0.55, [0, 2]), (0.85, [0, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p: float, kept: list[int]):
    logits = np.log([0.3, 0.05, 0.5, 0.15]).tolist()
    assert np.flatnonzero(frequencies(logits, Sampling(temperature=1.0, top_p=p))).tolist() == kept


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_max_tokens_below_one_is_refused():
    with pytest.raises(InputError, match="max_tokens"):
        next(generate(Scripted(), [1], END, 0))


def test_text_holds_a_character_back_until_it_is_whole():
    pieces = {1: b"a", 2: b"\xc3", 3: b"\xa9b", 4: b"\xe2\x82"}
    assert list(text(iter([1, 2, 3, 4]), lambda ids: b"".join(pieces[i] for i in ids))) == ["a", "éb", "�"]
