"""Measures of a model on a held-out split, and base against fine-tuned on the same one.

loss        mean -log p(target) over the counted targets, nats
perplexity  exp(loss)
bits/byte   the same loss in bits, over the bytes that the counted targets spell: comparable between tokenizers
accuracy    share of counted targets that were the likeliest token
Shapes: B batch, T time, E experts, L tokens of all documents behind each other.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from magellano.backend import mx
from magellano.data.shards import Batch, Shards
from magellano.decode import flat
from magellano.errors import InputError
from magellano.generate import prompt_chunk
from magellano.model import MagellanoLM
from magellano.progress import Progress


@dataclass(frozen=True)
class ExpertUse:
    """How one MoE layer spreads its tokens: share per expert, and entropy / log(E): 1 when even, 0 when one has all."""

    share: tuple[float, ...]
    evenness: float

    @classmethod
    def of(cls, counts: Sequence[int]) -> "ExpertUse":
        """From token copies per expert; at least one copy in all."""
        total = sum(counts)
        assert total > 0, "no tokens were routed"
        share = tuple(n / total for n in counts)
        entropy = -sum(s * math.log(s) for s in share if s)
        return cls(share, entropy / math.log(len(share)) if len(share) > 1 else 1.0)


@dataclass(frozen=True)
class Scores:
    """The measures of one model on one split; `tokens` and `bytes` are those of the counted targets."""

    loss: float
    perplexity: float
    bits_per_byte: float | None  # None where the targets spell no byte
    accuracy: float
    tokens: int
    bytes: int
    experts: tuple[ExpertUse, ...] = ()

    @property
    def evenness(self) -> float | None:
        """Mean over the MoE layers; None where there is none."""
        return float(np.mean([use.evenness for use in self.experts])) if self.experts else None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "evenness": self.evenness}


def score(
    model: MagellanoLM, split: Shards, bytes_of: np.ndarray, batch: int, max_tokens: int, progress: Progress
) -> Scores:
    """Measure `model` on the split's rows in order, up to the row that reaches `max_tokens` counted targets (0: all).

    `bytes_of` [V] holds the bytes that each token spells (end-of-text: 0). Raises InputError where no target counts and
    FloatingPointError where the model's loss is not finite.
    """
    loss = hits = 0.0
    tokens = spelled = 0
    experts: list[np.ndarray] = []
    for first in range(0, split.rows, batch):
        rows = split.batch(np.arange(first, min(first + batch, split.rows)))
        counted_BT = rows.weights > 0
        arrays = mx.array(rows.tokens), mx.array(rows.targets), mx.array(rows.reset)
        nll_BT, correct_BT = (np.array(a) for a in model.scores(*arrays))
        loss += float(nll_BT[counted_BT].sum(dtype=np.float64))
        hits += float(correct_BT[counted_BT].sum())
        tokens += int(counted_BT.sum())
        spelled += int(bytes_of[rows.targets[counted_BT]].sum())
        _add_counts(experts, _expert_counts(model, rows))
        progress(min(first + batch, split.rows), split.rows, loss=loss / max(tokens, 1))
        if 0 < max_tokens <= tokens:
            break
    if tokens == 0:
        raise InputError("the held-out split has no target that counts; raise data.held_out or give more data")
    mean = loss / tokens
    if not math.isfinite(mean):
        raise FloatingPointError(f"the model's loss on the held-out split is {mean}: it has diverged; lower train.lr")
    return Scores(
        loss=mean,
        perplexity=math.exp(min(mean, 700.0)),  # e^709 is a float's range
        bits_per_byte=loss / math.log(2) / spelled if spelled else None,
        accuracy=hits / tokens,
        tokens=tokens,
        bytes=spelled,
        experts=tuple(ExpertUse.of(counts.tolist()) for counts in experts),
    )


def _expert_counts(model: MagellanoLM, rows: Batch) -> list[list[int]]:
    """Counts without padding, which would all go to the same experts: the documents as one row, borders kept."""
    kept = [_used(weights) for weights in rows.weights]
    tokens_L = np.concatenate([row[:n] for row, n in zip(rows.tokens, kept, strict=True)])
    reset_L = np.concatenate([row[:n] for row, n in zip(rows.reset, kept, strict=True)])
    if not tokens_L.size:
        return []
    return model.expert_counts(mx.array(tokens_L[None]), mx.array(reset_L[None]))


def _used(weights_T: np.ndarray) -> int:
    """How much of a row lies up to its last counted target; what follows is padding."""
    counted = np.flatnonzero(weights_T)
    return int(counted[-1]) + 1 if counted.size else 0


def _add_counts(total: list[np.ndarray], counts: Sequence[Sequence[int]]) -> None:
    if not total:
        total.extend(np.asarray(c, dtype=np.int64) for c in counts)
        return
    for t, c in zip(total, counts, strict=False):
        t += np.asarray(c, dtype=np.int64)


def log_likelihoods(
    model: MagellanoLM, rows: Sequence[Sequence[int]], counted: Sequence[int], batch: int, progress: Progress
) -> list[tuple[float, bool]]:
    """Of the last counted[n] tokens of each row, given what is before them: the sum of log p, nats, and whether each
    was the likeliest. A row has at least one token more than are counted.

    Rows are padded on their right, where nothing that counts can see it, the longest first, and read in pieces that
    carry the state, so that memory does not grow with their length; the head sees what is counted alone.
    """
    order = sorted((n for n in range(len(rows)) if counted[n]), key=lambda n: -len(rows[n]))
    made = [(0.0, True)] * len(rows)
    for first in range(0, len(order), batch):
        group = order[first : first + batch]
        width = len(rows[group[0]]) - 1
        tokens_BT, targets_BT = np.zeros((2, len(group), width), np.int32)
        counted_BT = np.zeros((len(group), width), bool)
        for b, n in enumerate(group):
            length = len(rows[n]) - 1
            assert counted[n] <= length, "nothing stands before the first counted token"
            tokens_BT[b, :length], targets_BT[b, :length] = rows[n][:-1], rows[n][1:]
            counted_BT[b, length - counted[n] : length] = True
        for n, one in zip(group, _log_likelihoods(model, tokens_BT, targets_BT, counted_BT), strict=True):
            made[n] = one
        progress(min(first + batch, len(order)), len(order))
    return made


def _log_likelihoods(
    model: MagellanoLM, tokens_BT: np.ndarray, targets_BT: np.ndarray, counted_BT: np.ndarray
) -> list[tuple[float, bool]]:
    state, piece = model.initial_state(len(tokens_BT)), prompt_chunk()
    nll_BT, correct_BT = np.zeros(tokens_BT.shape), np.ones(tokens_BT.shape, bool)
    for at in range(0, tokens_BT.shape[1], piece):
        here = np.s_[:, at : at + piece]
        h_BTD, state = model.advance(mx.array(tokens_BT[here]), state)
        rows = np.flatnonzero(counted_BT[here])
        if rows.size:
            h_MD = h_BTD.reshape(-1, h_BTD.shape[-1])[mx.array(rows)]
            nll_M, correct_M = model.hidden_scores(h_MD, mx.array(targets_BT[here].reshape(-1)[rows]))
            nll_BT[here][counted_BT[here]], correct_BT[here][counted_BT[here]] = np.array(nll_M), np.array(correct_M)
        mx.eval(flat(state))
    return [(-float(nll.sum()), bool(correct.all())) for nll, correct in zip(nll_BT, correct_BT, strict=True)]


@dataclass(frozen=True)
class Verdict:
    """Base against fine-tuned: by how many percent of the base's loss and perplexity the fine-tuned model is lower."""

    improved: bool
    loss_percent: float
    perplexity_percent: float

    @classmethod
    def of(cls, base: Scores, tuned: Scores) -> "Verdict":
        """Both must be measures of the same targets."""
        assert base.tokens == tuned.tokens, "base and fine-tuned were measured on different targets"
        return cls(
            improved=tuned.loss < base.loss,
            loss_percent=100 * (1 - tuned.loss / base.loss) if base.loss else 0.0,
            perplexity_percent=100 * (1 - tuned.perplexity / base.perplexity),
        )

    def __str__(self) -> str:
        how = "better" if self.improved else "no better"
        return (
            f"fine-tuned is {how} than base: held-out loss {-self.loss_percent:+.1f} %, "
            f"perplexity {-self.perplexity_percent:+.1f} %"
        )


@dataclass(frozen=True)
class Example:
    """A held-out document cut where its first counted target stands: what is given, and what should follow."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


def examples(split: Shards, end_of_text: int, count: int, text_prompt: int = 24) -> list[Example]:
    """Up to `count` held-out documents, spread evenly over the split.

    A document whose every target counts (plain text) is cut after `text_prompt` tokens, or in its middle if shorter.
    """
    found = []
    rows = np.unique(np.linspace(0, split.rows - 1, max(8, 4 * count)).astype(int)) if split.rows else np.arange(0)
    for row in rows:
        batch = split.batch(np.array([row]))
        found += _documents(batch.tokens[0], batch.targets[0], batch.weights[0] > 0, batch.reset[0], end_of_text)[:2]
    cut = [_cut(example, text_prompt) for example in found]
    usable = [example for example in cut if example.prompt and example.completion]
    if len(usable) <= count:
        return usable
    return [usable[i] for i in np.linspace(0, len(usable) - 1, count).astype(int)] if count else []


def _documents(
    tokens_T: np.ndarray, targets_T: np.ndarray, counted_T: np.ndarray, reset_T: np.ndarray, end_of_text: int
) -> list[Example]:
    """The whole documents of one row: those that start with end-of-text and have a counted target."""
    starts = [*np.flatnonzero(reset_T), len(tokens_T)]
    documents = []
    for start, end in pairwise(starts):
        counted = np.flatnonzero(counted_T[start:end])
        if tokens_T[start] != end_of_text or not counted.size:
            continue
        first = int(counted[0])
        run = np.append(counted_T[start + first : end], False)
        last = first + int(np.argmin(run))  # the first target after the first counted run
        completion = [int(t) for t in targets_T[start + first : start + last] if t != end_of_text]
        documents.append(Example(tuple(tokens_T[start + 1 : start + first + 1].tolist()), tuple(completion)))
    return documents


def _cut(example: Example, text_prompt: int) -> Example:
    if example.prompt:
        return example
    at = min(text_prompt, len(example.completion) // 2)
    return Example(example.completion[:at], example.completion[at:])
