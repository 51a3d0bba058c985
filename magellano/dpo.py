"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290): of two answers to a prompt one is preferred.

The loss of a pair is -log sigmoid(z), z = r(chosen) - r(rejected), with the rewards r = beta (log p - log p0): p of the
answer's targets by the model, p0 by the reference, which is the model without its adapters. With label smoothing s (the
conservative DPO of Mitchell 2023) it is -(1 - s) log sigmoid(z) - s log sigmoid(-z).

The gradient in a target's -log p is beta (s sigmoid(z) - (1 - s) sigmoid(-z)), with a minus for the chosen and a plus
for the rejected answer: that of a cross-entropy whose weights, the same for all targets of an answer, may be negative.
So what `linear_cross_entropy` does serves, once a pass through the head alone has told z.

The reference is computed for each batch when it comes up: one forward pass more, but nothing to keep, to seal or to
resume, and no second model in memory, for the adapters are switched off.

Shapes: B batch, T time, D d_model, C targets that the head sees, P pairs, S = 2P answers, chosen and rejected in turn,
L targets of the longest answer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from magellano.backend import mx, on_gpu
from magellano.data import shards
from magellano.fuse import without_adapters
from magellano.model import MagellanoLM
from magellano.names import Objective
from magellano.objective import Objectives
from magellano.ops import token_scores
from magellano.ops.cross_entropy import objective_and_nll


@dataclass(frozen=True)
class Dpo:
    """How strongly rewards count, and how sure the labels are."""

    beta: float
    smoothing: float = 0.0

    @classmethod
    def of(cls, config: Objectives) -> "Dpo | None":
        """None where something else is minimised."""
        dpo = config.objective is Objective.DPO
        return cls(config.dpo_beta, config.dpo_label_smoothing) if dpo else None

    def losses(self, z_P: mx.array) -> tuple[mx.array, mx.array]:
        """Each pair's loss and its derivative in z."""
        s, none = self.smoothing, mx.zeros_like(z_P)
        loss_P = (1 - s) * mx.logaddexp(none, -z_P) + s * mx.logaddexp(none, z_P)
        return loss_P, s * mx.sigmoid(z_P) - (1 - s) * mx.sigmoid(-z_P)


@dataclass(frozen=True)
class Told:
    """Means over pairs: the loss in nats, the margin z, its sign being right, and both rewards."""

    loss: float
    margin: float
    accuracy: float
    reward_chosen: float
    reward_rejected: float


@dataclass(frozen=True)
class Answers:
    """Which targets of a batch, as rows 0 .. B*T-1, belong to which answer. rows, of_C int32 [C]: a row and its answer;
    counts_C float32: 1 where the target counts; places int32 [S, L]: an answer's among the C, filled up with C.
    """

    rows_C: mx.array
    of_C: mx.array
    counts_C: mx.array
    places_SL: mx.array

    @classmethod
    def of(cls, batch: shards.Batch) -> "Answers":
        """On a CPU the targets that count are all that the head sees; a GPU wants steps of one shape."""
        counted, answer = _found(batch)
        sizes = np.bincount(answer)
        assert sizes.size % 2 == 0 < sizes.size, f"{sizes.size} answers are no pairs"
        rows = np.arange(batch.weights.size) if on_gpu() else counted
        of, counts = np.zeros(rows.size, np.int32), np.zeros(rows.size, np.float32)
        where = counted if on_gpu() else np.arange(counted.size)  # of the counted targets among the C
        of[where], counts[where] = answer, 1.0
        along, starts = np.arange(sizes.max()), np.cumsum(sizes) - sizes
        at = np.minimum(starts[:, None] + along, counted.size - 1)
        places = np.where(along < sizes[:, None], where[at], rows.size)
        return cls(*(mx.array(a) for a in (rows.astype(np.int32), of, counts, places.astype(np.int32))))

    def log_p(self, model: MagellanoLM, h_BTD: mx.array, targets_BT: mx.array) -> mx.array:
        """log p of each answer from the final hidden states, float32 [S]; no gradient."""
        x_CD, w, u_Cr, b_Vr = model.head.head(mx.stop_gradient(h_BTD).reshape(-1, h_BTD.shape[-1])[self.rows_C])
        u_Cr, b_Vr = (None if a is None else mx.stop_gradient(a) for a in (u_Cr, b_Vr))
        target_C = targets_BT.reshape(-1)[self.rows_C]
        nll_C, _ = token_scores(x_CD, w, target_C, self.counts_C, u_Cr, b_Vr, model.chunk)
        return -mx.concatenate([nll_C, mx.zeros((1,))])[self.places_SL].sum(axis=1)


@dataclass(frozen=True)
class Pairs:
    """What makes a batch's preference its objective. `reference_S`: log p0 of each answer."""

    dpo: Dpo
    answers: Answers
    reference_S: mx.array

    @classmethod
    def of(cls, dpo: Dpo, model: MagellanoLM, batch: shards.Batch) -> "Pairs":
        """With the reference, computed."""
        answers = Answers.of(batch)
        with without_adapters(model):
            reference_S = _answered(model, answers, batch)
        return cls(dpo, answers, reference_S)

    def objective(self, model: MagellanoLM, h_BTD: mx.array, targets_BT: mx.array) -> tuple[mx.array, mx.array]:
        """A sum whose gradient is that of the sum of the pairs' losses, and what `told` takes, without gradient."""
        a = self.answers
        sums, derivative_P = self.measure(a.log_p(model, h_BTD, targets_BT))
        weight_S = self.dpo.beta * mx.stack([-derivative_P, derivative_P], axis=1).reshape(-1)
        weight_C = mx.stop_gradient(a.counts_C * weight_S[a.of_C])
        x_CD, w, u_Cr, b_Vr = model.head.head(h_BTD.reshape(-1, h_BTD.shape[-1])[a.rows_C])
        target_C = targets_BT.reshape(-1)[a.rows_C]
        frozen = u_Cr is not None
        total, _ = objective_and_nll(x_CD, w, target_C, weight_C, u_Cr, b_Vr, model.chunk, frozen=frozen)
        return total, mx.stop_gradient(sums)

    def measure(self, log_p_S: mx.array) -> tuple[mx.array, mx.array]:
        """Sums over pairs in `Told`'s order, float32 [5], and the losses' derivatives [P]."""
        reward_P2 = self.dpo.beta * (log_p_S - self.reference_S).reshape(-1, 2)
        z_P = reward_P2[:, 0] - reward_P2[:, 1]
        loss_P, derivative_P = self.dpo.losses(z_P)
        right_P = (z_P > 0).astype(mx.float32)
        return mx.stack([x.sum() for x in (loss_P, z_P, right_P, reward_P2[:, 0], reward_P2[:, 1])]), derivative_P


def _found(batch: shards.Batch) -> tuple[np.ndarray, np.ndarray]:
    """The rows 0 .. B*T-1 that count, and the number of the answer that each belongs to. Each document has one."""
    counted = np.flatnonzero(batch.weights)
    document = np.cumsum(batch.reset.reshape(-1) != 0)[counted]
    return counted, np.cumsum(np.diff(document, prepend=-1) != 0) - 1


def count(batch: shards.Batch) -> int:
    """How many pairs are in a batch."""
    return int(_found(batch)[1][-1] + 1) // 2


def told(sums: Sequence[float] | np.ndarray, pairs: int) -> Told:
    """Means from sums over so many pairs."""
    return Told(*(float(x) / max(pairs, 1) for x in sums))


def held_out(dpo: Dpo, model: MagellanoLM, batch: shards.Batch) -> tuple[np.ndarray, int]:
    """A batch's sums in `Told`'s order, and its pairs; nothing is trained."""
    pairs = Pairs.of(dpo, model, batch)
    sums, derivative_P = pairs.measure(_answered(model, pairs.answers, batch))
    return np.array(sums, dtype=np.float64), derivative_P.size


def log_p(model: MagellanoLM, batch: shards.Batch) -> np.ndarray:
    """log p of a batch's answers, float64 [P, 2], chosen and rejected."""
    return np.array(_answered(model, Answers.of(batch), batch), dtype=np.float64).reshape(-1, 2)


def _answered(model: MagellanoLM, answers: Answers, batch: shards.Batch) -> mx.array:
    hidden_BTD = model.hidden(mx.array(batch.tokens), mx.array(batch.reset))
    log_p_S = answers.log_p(model, hidden_BTD, mx.array(batch.targets))
    mx.eval(log_p_S)
    return log_p_S


class ChosenAlone(shards.Shards):
    """A split of pairs in which the rejected answers do not count: for measures of what is to be said."""

    def batch(self, indices: Sequence[int] | np.ndarray) -> shards.Batch:
        batch = super().batch(indices)
        counted, answer = _found(batch)
        weights = batch.weights.copy()
        weights.reshape(-1)[counted[answer % 2 == 1]] = 0
        return replace(batch, weights=weights)


def held_out_split(tokens: Path) -> shards.Shards:
    """The held-out split as what is to be said: all of it, or of pairs the chosen answers."""
    split = shards.Shards(tokens, "held_out")
    return ChosenAlone(tokens, "held_out") if split.facts.get("pairs") else split
