"""How a training uses its experts: load and entropy per MoE layer over time, alarms, and what a reader sees of them.

A line {"step", "experts": shares per MoE layer, "entropy": per MoE layer} of metrics.jsonl for each look. A look routes
a few hundred held-out tokens between two steps: no step waits for it, and all looks see the same tokens.
Shares are of token copies (each token has top_k of them); E experts, L tokens of documents behind each other.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from magellano import report
from magellano.backend import mx
from magellano.data.shards import Shards
from magellano.evaluate import ExpertUse
from magellano.model import MagellanoLM

log = logging.getLogger(__name__)

LOAD = "experts"
LOAD_PNG = "expert-load.png"
TOKENS = 512  # that a look routes
LOOKS = 20  # in a training, at most; fewer where log_every is wide


def most(top_k: int, experts: int) -> float:
    """The share of all tokens above which one expert gets too many: half of them, or, where an even load is half
    already, the middle between even and all.
    """
    even = top_k / experts
    return 0.5 if even < 0.5 else (1 + even) / 2


def alarms(shares: Sequence[Sequence[float]], top_k: int) -> dict[tuple[int, int], str]:
    """What is wrong, by (MoE layer, expert): one that gets nothing, one that most tokens go to."""
    found = {}
    for layer, share_E in enumerate(shares):
        limit = most(top_k, len(share_E))
        for expert, share in enumerate(share_E):
            who = f"MoE layer {layer}: expert {expert}"
            if share == 0:
                found[layer, expert] = f"{who} is dead, it gets no token"
            elif share * top_k > limit:
                found[layer, expert] = f"{who} gets {share * top_k:.0%} of the tokens, more than {limit:.0%}"
    return found


class Watch:
    """Looks at a training's experts. A model without MoE layers has nothing to look at."""

    def __init__(self, model: MagellanoLM, split: Shards, steps: int, log_every: int):
        self._model, self._told = model, set[tuple[int, int]]()
        self.every = log_every * max(1, -(-steps // (LOOKS * log_every)))
        self._sample = _sample(split)

    def __call__(self, step: int) -> dict[str, Any] | None:
        """The line for metrics.jsonl, None where there is nothing to see; an alarm is a warning, once an expert."""
        if self._sample is None or not (counts := self._model.expert_counts(*self._sample)):
            return None
        uses = [ExpertUse.of(c) for c in counts]
        for who, text in alarms([use.share for use in uses], self._model.config.top_k).items():
            if who not in self._told:
                log.warning("step %d: %s", step, text)
            self._told.add(who)
        shares = [[round(s, 4) for s in use.share] for use in uses]
        return {"step": step, LOAD: shares, "entropy": [round(use.evenness, 4) for use in uses]}


def _sample(split: Shards) -> tuple[mx.array, mx.array] | None:
    """tokens [1, L] and reset [1, L]: the first documents of the split without padding, up to TOKENS."""
    tokens: list[np.ndarray] = []
    reset: list[np.ndarray] = []
    for row in range(min(split.rows, -(-TOKENS // split.seq_len) + 1)):
        batch = split.batch(np.array([row]))
        counted = np.flatnonzero(batch.weights[0])
        used = int(counted[-1]) + 1 if counted.size else 0
        tokens.append(batch.tokens[0][:used])
        reset.append(batch.reset[0][:used])
    tokens_L, reset_L = (np.concatenate([*parts, []])[:TOKENS] for parts in (tokens, reset))
    if not tokens_L.size:
        return None
    return mx.array(tokens_L.astype(np.int32)[None]), mx.array(reset_L.astype(np.uint8)[None])


def looks(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of a metrics.jsonl's lines that are looks."""
    return [line for line in lines if LOAD in line]


def table(lines: Sequence[dict[str, Any]], top_k: int) -> report.Table:
    """Each MoE layer's entropy at the first and the last look, its fullest and emptiest expert, and alarms of any."""
    seen, rows = looks(lines), []
    for layer in range(len(seen[-1][LOAD]) if seen else 0):
        last = seen[-1][LOAD][layer]
        told = {text: look["step"] for look in reversed(seen) for (at, _), text in alarms(look[LOAD], top_k).items()
                if at == layer}  # fmt: skip
        said = "; ".join(f"step {step}: {text.partition(': ')[2]}" for text, step in list(told.items())[-2:])
        rows.append((
            str(layer), f"{seen[0]['entropy'][layer]:.3f}", f"{seen[-1]['entropy'][layer]:.3f}",
            f"{max(last):.1%}", f"{min(last):.1%}", said or "none",
        ))  # fmt: skip
    title = f"Experts while training ({len(seen)} looks, entropy 1 is even)"
    columns = ("MoE layer", "entropy, first", "entropy, last", "fullest", "emptiest", "alarms")
    return report.Table(title, columns, tuple(rows), numbers=False)


def picture(out: Path, lines: Sequence[dict[str, Any]]) -> None:
    """Share per expert over the steps, one panel per MoE layer, at most twelve."""
    seen = looks(lines)
    layers = min(len(seen[-1][LOAD]), 12)
    figure, axes = report.figure(layers, "step", "share of token copies")
    steps = [look["step"] for look in seen]
    for layer, axis in enumerate(axes):
        shares = np.array([look[LOAD][layer] for look in seen])
        for expert in range(shares.shape[1]):
            axis.plot(steps, shares[:, expert], marker="o", ms=2.5, lw=1.2, label=f"expert {expert}")
        axis.axhline(1 / shares.shape[1], color=report.INK, ls="--", lw=1)
        axis.set_ylim(bottom=0)
        axis.set_title(f"MoE layer {layer}: entropy {seen[-1]['entropy'][layer]:.3f}", loc="left", color=report.INK)
    axes[0].legend(frameon=False, fontsize=7, ncols=2)
    report.save(figure, out)
