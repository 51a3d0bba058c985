"""metrics.jsonl: what was observed while training, a line a logged step, evaluation or rollback."""

import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

ROLLBACK = "rollback"


@dataclass
class Metrics:
    """One line of metrics.jsonl. loss: plain cross-entropy in nats a target token, whatever is minimised; norm: before
    clipping; skipped: gradient not finite, or the batch passed over.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int  # target tokens so far
    tokens_per_s: float  # input tokens, all of the row
    peak_gib: float  # MLX's own counter
    seconds: float
    skipped: bool = False


@dataclass
class PairMetrics(Metrics):
    """The same of a step on preferences: loss is that of a pair, in nats; the others are means over its pairs, as in
    dpo.Told.
    """

    margin: float = math.nan
    pair_accuracy: float = math.nan
    reward_chosen: float = math.nan
    reward_rejected: float = math.nan


class Mirror(Protocol):
    """Something that shows the same lines elsewhere, see magellano/tensorboard.py."""

    def begin(self, lines: Iterable[dict[str, Any]]) -> None: ...

    def add(self, line: dict[str, Any]) -> None: ...


class MetricsFile:
    """metrics.jsonl in the work folder. A training that goes back to an earlier step takes its later lines back, so
    that none stands twice; only rollbacks that the training remembers stay.
    """

    def __init__(self, path: Path, mirror: Mirror | None = None):
        self.path, self._mirror = path, mirror

    def rewind(self, step: int, rollbacks: Sequence[dict[str, Any]]) -> None:
        """Keep the lines up to `step` and those of `rollbacks`, each of which then has one; whole or not at all."""
        told = [_of(rollback) for rollback in rollbacks]
        lines = list(self._lines()) if self.path.is_file() else []
        kept = [line for line in lines if (line in told if ROLLBACK in line else line["step"] <= step)]
        kept += [line for line in told if line not in kept]
        temporary = self.path.with_name(f".{self.path.name}")
        with open(temporary, "w", encoding="utf-8", opener=_private) as f:
            f.writelines(json.dumps(line) + "\n" for line in kept)
            f.flush()
            os.fsync(f.fileno())
        temporary.replace(self.path)
        if self._mirror is not None:
            self._mirror.begin(kept)

    def _lines(self) -> Iterator[dict[str, Any]]:
        for text in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                line = json.loads(text)
                int(line["step"])
            except (ValueError, KeyError, TypeError):
                return  # a line cut off by a kill: it lies after the checkpoint
            yield line

    def __call__(self, line: dict[str, Any]) -> None:
        """Add a line, without the numbers that are not finite, which JSON does not have."""
        finite = {k: v for k, v in line.items() if not isinstance(v, float) or math.isfinite(v)}
        with open(self.path, "a", encoding="utf-8", opener=_private) as f:
            f.write(json.dumps(finite) + "\n")
        if self._mirror is not None:
            self._mirror.add(finite)


def _of(rollback: dict[str, Any]) -> dict[str, Any]:
    return {"step": rollback["step"], ROLLBACK: {k: v for k, v in rollback.items() if k != "step"}}


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
