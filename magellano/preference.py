"""Which of two answers base and fine-tuned model prefer, on held-out pairs; as numbers, a table and a picture."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from magellano import report

if TYPE_CHECKING:
    from magellano.data.shards import Shards
    from magellano.dpo import Dpo
    from magellano.model import MagellanoLM

EVEN = math.log(2)  # the loss of the base, which prefers nothing to itself


def log_p(model: "MagellanoLM", split: "Shards", batch: int, max_tokens: int = 0) -> np.ndarray:
    """log p of a split's answers, float64 [P, 2], chosen and rejected; up to the row that reaches `max_tokens` targets
    of answers (0: all).
    """
    from magellano import dpo

    found, tokens = [], 0.0
    for first in range(0, split.rows, batch):
        rows = split.batch(np.arange(first, min(first + batch, split.rows)))
        found.append(dpo.log_p(model, rows))
        tokens += float(rows.weights.sum())
        if 0 < max_tokens <= tokens:
            break
    return np.concatenate(found)


@dataclass(frozen=True)
class Preference:
    """What held-out pairs say. *_likelier: the share in which the model itself finds the chosen answer likelier; the
    others are of the fine-tuned model against its base, as `Told`.
    """

    pairs: int
    base_likelier: float
    tuned_likelier: float
    loss: float
    accuracy: float
    margin: float
    reward_chosen: float
    reward_rejected: float

    @classmethod
    def of(cls, settings: "Dpo", base_P2: np.ndarray, tuned_P2: np.ndarray) -> "Preference":
        """From both models' log p of the same pairs."""
        chosen_P, rejected_P = (settings.beta * (tuned_P2 - base_P2)).T
        z_P, s = chosen_P - rejected_P, settings.smoothing
        loss_P = (1 - s) * np.logaddexp(0, -z_P) + s * np.logaddexp(0, z_P)
        likelier = (float((p[:, 0] > p[:, 1]).mean()) for p in (base_P2, tuned_P2))
        means = (float(x.mean()) for x in (loss_P, z_P > 0, z_P, chosen_P, rejected_P))
        return cls(len(z_P), *likelier, *means)

    @property
    def improved(self) -> bool:
        """Whether the loss is below that of the base, which prefers nothing to itself."""
        return self.loss < EVEN

    def __str__(self) -> str:
        how = "better" if self.improved else "no better"
        return (
            f"fine-tuned is {how} than base: it moved towards the chosen answer in {self.accuracy:.1%} of "
            f"{self.pairs:,} held-out pairs, margin {self.margin:+.3f}, loss {self.loss:.4f} (base {EVEN:.4f})"
        )


def table(evaluation: dict[str, Any]) -> report.Table:
    """`evaluation` as evaluation.json; no rows where the run was not about pairs."""
    found, columns = evaluation.get("preference"), ("measure", "base", "fine-tuned")
    if found is None:
        return report.Table("", columns, ())
    rows = (
        ("chosen answer likelier", f"{found['base_likelier']:.1%}", f"{found['tuned_likelier']:.1%}"),
        ("moved towards the chosen answer", "", f"{found['accuracy']:.1%}"),
        ("margin of the rewards", "", f"{found['margin']:+.4f}"),
        ("reward of the chosen answer", "", f"{found['reward_chosen']:+.4f}"),
        ("reward of the rejected answer", "", f"{found['reward_rejected']:+.4f}"),
        ("loss (nats/pair)", f"{EVEN:.4f}", f"{found['loss']:.4f}"),
    )
    return report.Table(f"Preference: {found['pairs']:,} held-out pairs, beta {found['beta']:g}", columns, rows)


def picture(out: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Loss, margin and accuracy over the steps of a training, from its metrics."""
    drawn, axes = report.figure(3, "step", "")
    for axis, (name, key, held_out) in zip(
        axes,
        (
            ("loss (nats/pair)", "loss", "held_out_loss"),
            ("margin of the rewards", "margin", "held_out_margin"),
            ("moved towards the chosen answer", "pair_accuracy", "held_out_accuracy"),
        ),
        strict=True,
    ):
        for label, of, style in (("training", key, "-"), ("held out", held_out, "o")):
            points = [(line["step"], line[of]) for line in lines if of in line]
            if points:
                colour = report.TUNED_COLOUR if of == key else report.INK
                axis.plot(*zip(*points, strict=True), style, ms=4, lw=1.6, color=colour, label=label)
        axis.set_title(name, loc="left", color=report.INK)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(frameon=False, fontsize=8)
    report.save(drawn, out)
