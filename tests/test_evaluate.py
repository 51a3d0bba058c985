"""Measures against hand-made numbers, and the cutting of held-out documents into prompt and completion."""

import math
from dataclasses import dataclass

import numpy as np
import pytest

from magellano.backend import mx
from magellano.errors import InputError
from magellano.evaluate import ExpertUse, Scores, Verdict, examples, log_likelihoods, score
from magellano.model import MagellanoLM, seeded
from magellano.progress import silent
from tests import models

END = 9
BYTES = np.array([1, 2, 3, 4, 1, 1, 1, 1, 1, 0])


@dataclass
class Rows:
    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    reset: np.ndarray


@dataclass
class Memory:
    """A split in memory, with the interface of data.shards.Shards."""

    all: Rows

    @property
    def rows(self) -> int:
        return len(self.all.tokens)

    def batch(self, indices: np.ndarray) -> Rows:
        a = self.all
        return Rows(a.tokens[indices], a.targets[indices], a.weights[indices], a.reset[indices])


def split(documents: list[tuple[list[int], int]], length: int) -> Memory:
    """One document (tokens, length of its prompt) a row, packed as stages.tokenize does, padded with end-of-text."""
    rows = []
    for tokens, prompt in documents:
        n = len(tokens) + 1
        pad = length - n
        rows.append((
            [END, *tokens] + [END] * pad,
            [*tokens, END] + [END] * pad,
            [0.0] * prompt + [1.0] * (n - prompt) + [0.0] * pad,
            [1] + [0] * (n - 1) + [1] * pad,
        ))  # fmt: skip
    columns = [np.array(c) for c in zip(*rows, strict=True)]
    return Memory(Rows(columns[0], columns[1], columns[2].astype(np.float32), columns[3].astype(np.uint8)))


class Fixed:
    """-log p(target) = 0.5 * target, right where the target is even; counts tokens by their parity."""

    def __init__(self) -> None:
        self.counted: list[int] = []

    def scores(self, tokens_BT: mx.array, targets_BT: mx.array, reset_BT: mx.array) -> tuple[mx.array, mx.array]:
        return 0.5 * targets_BT.astype(mx.float32), targets_BT % 2 == 0

    def expert_counts(self, tokens_BT: mx.array, reset_BT: mx.array) -> list[list[int]]:
        self.counted += tokens_BT.reshape(-1).tolist()
        odd = int((tokens_BT % 2).sum().item())
        return [[odd, tokens_BT.size - odd], [tokens_BT.size, 0]]


def quiet(done: int, total: int, **facts: float | str) -> None:
    pass


def test_measures_count_the_counted_targets_alone():
    # targets that count: [2, 3, 9] and [4, 9]; bytes 3 + 4 + 0 and 1 + 0
    held_out = split([([1, 2, 3], 1), ([5, 6, 4], 2)], length=7)
    got = score(Fixed(), held_out, BYTES, batch=1, max_tokens=0, progress=quiet)
    nll = 0.5 * (2 + 3 + 9 + 4 + 9)
    assert got.tokens == 5
    assert got.bytes == 8
    assert got.loss == pytest.approx(nll / 5)
    assert got.perplexity == pytest.approx(math.exp(nll / 5))
    assert got.bits_per_byte == pytest.approx(nll / math.log(2) / 8)
    assert got.accuracy == pytest.approx(2 / 5)


def test_batch_size_changes_nothing():
    held_out = split([([1, 2, 3], 1), ([5, 6, 4], 2), ([7], 0)], length=7)
    got = [score(Fixed(), held_out, BYTES, batch, 0, quiet) for batch in (1, 2, 3, 8)]
    assert all(g == got[0] for g in got)


def test_expert_use_leaves_padding_out():
    model = Fixed()
    got = score(model, split([([1, 2, 3], 1), ([5], 0)], length=8), BYTES, batch=2, max_tokens=0, progress=quiet)
    assert model.counted == [END, 1, 2, 3, END, 5]
    assert got.experts[0].share == pytest.approx((5 / 6, 1 / 6))
    assert got.experts[1].evenness == 0


def test_max_tokens_stops_at_the_row_that_reaches_it():
    held_out = split([([1, 2, 3], 0)] * 4, length=5)
    assert score(Fixed(), held_out, BYTES, 1, 5, quiet).tokens == 8


def test_progress_reaches_the_end():
    seen: list[tuple[int, int]] = []
    score(
        Fixed(), split([([1], 0)] * 3, length=3), BYTES, 2, 0, lambda done, total, **facts: seen.append((done, total))
    )
    assert seen == [(2, 3), (3, 3)]


def test_a_split_without_counted_targets_is_refused():
    held_out = split([([1, 2], 3)], length=4)
    with pytest.raises(InputError, match="no target that counts"):
        score(Fixed(), held_out, BYTES, 1, 0, quiet)


def test_a_diverged_model_is_told_not_reported():
    class Diverged(Fixed):
        def scores(self, tokens_BT, targets_BT, reset_BT):
            return mx.full(targets_BT.shape, mx.nan), targets_BT == 0

    with pytest.raises(FloatingPointError, match="diverged"):
        score(Diverged(), split([([1], 0)], length=3), BYTES, 1, 0, quiet)


@pytest.mark.parametrize(
    ("counts", "evenness"), [([5, 5, 5, 5], 1.0), ([9, 0, 0, 0], 0.0), ([3, 3, 0, 0], 0.5), ([4], 1.0)]
)
def test_evenness_is_the_entropy_over_that_of_an_even_split(counts: list[int], evenness: float):
    assert ExpertUse.of(counts).evenness == pytest.approx(evenness)


def scores(loss: float, tokens: int = 10) -> Scores:
    return Scores(loss, math.exp(loss), loss, 0.5, tokens, 20)


def test_verdict_says_by_how_much():
    better = Verdict.of(scores(4.0), scores(3.0))
    assert better.improved
    assert better.loss_percent == pytest.approx(25)
    assert better.perplexity_percent == pytest.approx(100 * (1 - math.exp(-1)))
    assert str(better) == "fine-tuned is better than base: held-out loss -25.0 %, perplexity -63.2 %"
    worse = Verdict.of(scores(3.0), scores(4.0))
    assert not worse.improved
    assert "no better" in str(worse)


def test_equal_is_no_improvement():
    assert not Verdict.of(scores(3.0), scores(3.0)).improved


def test_verdict_refuses_different_targets():
    with pytest.raises(AssertionError, match="different targets"):
        Verdict.of(scores(3.0, 10), scores(2.0, 11))


def test_an_example_is_cut_where_the_loss_starts():
    (example,) = examples(split([([1, 2, 3, 4], 2)], length=8), END, 3)
    assert example.prompt == (1, 2)
    assert example.completion == (3, 4)


def test_plain_text_is_cut_after_the_given_length_or_in_its_middle():
    documents = split([([1, 2, 3, 4, 5, 6], 0), ([1, 2], 0)], length=8)
    long, short = examples(documents, END, 2, text_prompt=2)
    assert (long.prompt, long.completion) == ((1, 2), (3, 4, 5, 6))
    assert (short.prompt, short.completion) == ((1,), (2,))


def test_pieces_padding_and_prompts_without_completion_are_no_examples():
    held_out = split([([1, 2, 3], 1), ([1, 2, 3], 3)], length=6)
    held_out.all.tokens[0, 0] = 5  # continues a document that was cut
    assert examples(held_out, END, 4) == []


def test_as_many_examples_as_asked_for_and_the_same_each_time():
    held_out = split([([n % 8, 2, 3], 1) for n in range(50)], length=6)
    first = examples(held_out, END, 4)
    assert len(first) == 4
    assert len({e.prompt for e in first}) > 1
    assert first == examples(held_out, END, 4)
    assert examples(held_out, END, 0) == []


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 0.02)])
def test_log_likelihoods_do_not_see_padding_or_pieces(dtype: str, bound: float):
    """Per token, against all logits of each row alone; the longest row is read in two pieces."""
    model = MagellanoLM(models.TINY, seeded(3), getattr(mx, dtype))
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 300, n).tolist() for n in (5, 300, 2, 40, 1)]
    counted = [2, 280, 1, 39, 0]
    got = log_likelihoods(model, rows, counted, 3, silent)
    for row, last, (total, greedy) in zip(rows, counted, got, strict=True):
        if not last:
            assert (total, greedy) == (0.0, True)
            continue
        logits_TV = np.array(model(mx.array([row[:-1]]))[0].astype(mx.float32)).astype(np.float64)[-last:]
        p_TV = logits_TV - np.log(np.exp(logits_TV).sum(1, keepdims=True))
        wanted = np.array(row[-last:])
        assert total / last == pytest.approx(p_TV[np.arange(last), wanted].mean(), abs=bound)
        if dtype == "float32":
            assert greedy == bool((logits_TV.argmax(1) == wanted).all())
