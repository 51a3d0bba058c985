"""What counts as a training gone wrong, and what follows: it is set back, and goes on past the batches that did it.

A step whose loss or gradient is not finite changes nothing. It counts as bad unless a dynamic loss scale explains it:
the loss is finite, the scale is above its floor of 1, and no more than 10 steps in a row have halved it. Three bad
steps without a good one between, a loss above 10 times the median of the last 32, or a state that is not finite when it
is to be saved, set the training back to a checkpoint before those steps, and their batches are passed over from then
on. Where trouble comes back right behind batches that were passed over, the update before them is to blame, for it made
the weights that they met: its batch goes too. A run is set back 8 times at most.

All of this depends on the training alone and is part of every checkpoint. The steps before the first batch passed over
are repeated as they were, so neither the checkpoint that a training was set back to nor a kill or a stop in between
changes where it ends.
"""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from magellano.backend import mx
from magellano.errors import Diverged

IN_A_ROW = 3
HALVINGS = 10  # steps in a row that a dynamic loss scale may overflow
SPIKE, WINDOW, AT_LEAST = 10.0, 32, 8  # times the median of so many losses; fewer than AT_LEAST tell nothing
LEAST_MEDIAN = 0.1  # nats a token; below it a loss that jumps tenfold is a rare token, not a training gone wrong
ROLLBACKS = 8
_EXPONENT = {  # the bits that are all 1 in infinity and NaN alone
    mx.float32: (mx.uint32, 0x7F800000), mx.float16: (mx.uint16, 0x7C00), mx.bfloat16: (mx.uint16, 0x7F80),
}  # fmt: skip


class NotFinite(FloatingPointError):
    """A state that must not be saved."""


@dataclass(frozen=True)
class Trouble:
    """Why the training must be set back, and the steps (from 1) whose batches are blamed."""

    why: str
    steps: tuple[int, ...]


@dataclass
class Guard:
    """losses: of the last steps that were good; bad: steps that count, without a good one between; not_finite: steps in
    a row that changed nothing; passed: steps whose batches are passed over; rollbacks: what is told about each.
    """

    losses: list[float] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)
    not_finite: int = 0
    passed: list[int] = field(default_factory=list)
    rollbacks: list[dict[str, Any]] = field(default_factory=list)

    def judge(self, step: int, loss: float | None, finite: bool, can_overflow: bool) -> Trouble | None:
        """What to make of step `step`. `loss`: nats a token, None where no token counted; `finite`: it and the
        gradient; `can_overflow`: the loss scale could still be halved.
        """
        if finite:
            self.bad, self.not_finite = [], 0
            return None if loss is None else self._spike(step, loss)
        self.not_finite += 1
        if can_overflow and (loss is None or math.isfinite(loss)) and self.not_finite <= HALVINGS:
            return None
        self.bad.append(step)
        if len(self.bad) < IN_A_ROW:
            return None
        return Trouble(f"loss or gradient was not finite in {IN_A_ROW} steps in a row", tuple(self.bad))

    def _spike(self, step: int, loss: float) -> Trouble | None:
        if len(self.losses) >= AT_LEAST:
            median = statistics.median(self.losses)
            if loss > SPIKE * max(median, LEAST_MEDIAN):
                return Trouble(f"loss {loss:.4g} is over {SPIKE:g} times the median {median:.4g}", (step,))
        self.losses = [*self.losses, loss][-WINDOW:]
        return None

    def doubts(self, step: int) -> bool:
        """Whether the state after step `step` has yet to show that it is sound."""
        return bool(self.bad) or step in self.passed

    def pass_over(self, trouble: Trouble, rows: Callable[[int], list[int]]) -> int:
        """Remember the blamed batches; `rows(step)`: the row numbers of a step's. Returns the last step, 0 for none,
        whose state is untouched by any that is new among them. Raises Diverged where that has been done too often.
        """
        known, first = set(self.passed), min(trouble.steps)
        before = first if first in known else first - 1
        while before in known:
            before -= 1
        returned = first in known or before < first - 1
        new = {step for step in (*trouble.steps, *([before] if returned else [])) if step >= 1} - known
        if len(self.rollbacks) >= ROLLBACKS or not new:
            raise Diverged(
                f"step {trouble.steps[-1]}: {trouble.why}, and the training was set back {len(self.rollbacks)} times "
                f"before; lower train.lr, or look at the rows of steps {_listed(self.passed)} in metrics.jsonl"
            )
        passed = [{"step": step, "rows": rows(step)} for step in sorted(new)]
        self.rollbacks.append({"step": trouble.steps[-1], "why": trouble.why, "passed": passed})
        self.passed = sorted(known | new)
        return min(new) - 1


def all_finite(arrays: Iterable[mx.array]) -> bool:
    """Whether every number in `arrays` is finite. By their bits: on a CPU MLX's isfinite takes thirty times as long for
    16-bit floats. One wait on a GPU.
    """
    found = [mx.array(False)]
    for a in arrays:
        if a.size and a.dtype in _EXPONENT:
            bits, mask = _EXPONENT[a.dtype]
            found.append((a.reshape(-1).view(bits) & mx.array(mask, dtype=bits)).max() == mask)
    return not np.array(mx.stack(found)).any()


def _listed(steps: list[int]) -> str:
    return ", ".join(map(str, steps[-12:])) or "-"
