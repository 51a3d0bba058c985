"""Experts over time: what alarms, what is looked at, and what a reader sees."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magellano import experts
from magellano.data.shards import Batch
from magellano.experts import LOAD, Watch, alarms, most, picture, table
from magellano.profile import ModelConfig


@pytest.mark.parametrize(
    ("top_k", "count", "limit"), [(2, 8, 0.5), (1, 4, 0.5), (2, 4, 0.75), (1, 2, 0.75), (2, 2, 1.0)]
)
def test_half_of_the_tokens_is_too_much_where_an_even_load_is_less(top_k: int, count: int, limit: float) -> None:
    assert most(top_k, count) == limit
    even = [[1 / count] * count]
    assert alarms(even, top_k) == {}


def test_an_alarm_for_each_expert_that_gets_too_much_or_nothing() -> None:
    shares = [[0.26, 0.24, 0.25, 0.25, 0, 0, 0, 0], [0.125] * 8]
    found = alarms(shares, 2)
    assert found.pop((0, 0)) == "MoE layer 0: expert 0 gets 52% of the tokens, more than 50%"
    assert set(found) == {(0, expert) for expert in (4, 5, 6, 7)}
    assert all(text.endswith("is dead, it gets no token") for text in found.values())


class Split:
    """Two rows of 8 with 3 and 8 tokens before the padding."""

    rows, seq_len = 2, 8

    def batch(self, rows: np.ndarray) -> Batch:
        used = (3, 8)[int(rows[0])]
        tokens = np.arange(8, dtype=np.int32)[None] + 10 * rows[0]
        weights = np.where(np.arange(8) < used, 1.0, 0.0).astype(np.float32)[None]
        return Batch(tokens, tokens + 1, weights, (np.arange(8) == 0).astype(np.uint8)[None])


class Model:
    """Stands for a model of 8 experts; `counts` is what its routers did."""

    config = ModelConfig(
        d_model=32, n_layers=4, n_experts=8, top_k=2, d_ff=32, d_state=4, dt_rank=4, vocab_size=300
    )  # fmt: skip

    def __init__(self, counts: list[list[int]]) -> None:
        self.counts, self.seen = counts, list[Any]()

    def expert_counts(self, tokens: Any, reset: Any) -> list[list[int]]:
        self.seen.append((np.array(tokens).tolist(), np.array(reset).tolist()))
        return self.counts


def test_a_look_routes_the_same_tokens_without_padding_and_warns_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("magellano")
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "handlers", [])  # without what a flow in this process has put there
    model = Model([[9, 2, 2, 2, 2, 2, 1, 0]])
    watch = Watch(model, Split(), steps=1000, log_every=10)  # type: ignore[arg-type]
    assert watch.every == 50
    with caplog.at_level(logging.WARNING, logger="magellano"):
        lines = [watch(50), watch(100)]
    assert lines[0] == {"step": 50, LOAD: [[0.45, 0.1, 0.1, 0.1, 0.1, 0.1, 0.05, 0.0]], "entropy": [0.7985]}
    assert model.seen[0] == model.seen[1] == ([[0, 1, 2, *range(10, 18)]], [[1, 0, 0, 1, *[0] * 7]])
    assert [r.getMessage() for r in caplog.records] == [
        "step 50: MoE layer 0: expert 0 gets 90% of the tokens, more than 50%",
        "step 50: MoE layer 0: expert 7 is dead, it gets no token",
    ]


def test_looks_are_few_in_a_long_training_and_none_without_experts() -> None:
    assert Watch(Model([]), Split(), steps=5, log_every=10).every == 10  # type: ignore[arg-type]
    assert Watch(Model([]), Split(), steps=10_000, log_every=10).every == 500  # type: ignore[arg-type]
    assert Watch(Model([]), Split(), steps=5, log_every=10)(5) is None  # type: ignore[arg-type]


def test_the_table_has_first_last_and_the_alarms_of_any_look(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 3.0},
        {"step": 1, LOAD: [[0.5, 0.3, 0.2, 0.0]], "entropy": [0.743]},
        {"step": 10, LOAD: [[0.3, 0.2, 0.2, 0.3]], "entropy": [0.985]},
    ]
    found = table(lines, top_k=1)
    assert found.title == "Experts while training (2 looks, entropy 1 is even)"
    assert found.rows == (("0", "0.743", "0.985", "30.0%", "20.0%", "step 1: expert 3 is dead, it gets no token"),)
    assert table(lines[:1], 1).rows == ()
    picture(tmp_path / experts.LOAD_PNG, lines)
    assert (tmp_path / experts.LOAD_PNG).read_bytes().startswith(b"\x89PNG")
