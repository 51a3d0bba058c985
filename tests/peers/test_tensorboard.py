"""TensorBoard itself reads what a training wrote, before it was stopped and after, each point once."""

from pathlib import Path

import pytest

from magellano import tensorboard
from magellano.metrics import MetricsFile
from magellano.names import METRICS

accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="pip install -r requirements-peers.lock"
)


def test_tensorboard_shows_each_point_once_also_where_it_was_open(tmp_path: Path) -> None:
    folder = tmp_path / "demo" / "train-01234567"
    metrics = MetricsFile(tmp_path / METRICS, tensorboard.Mirror(folder))
    metrics.rewind(0, [])
    for step in range(1, 6):
        metrics({"step": step, "loss": float(step), "lr": 1e-3, "grad_norm": 1.0, "tokens_per_s": 5.0, "peak_gib": 0.1})
    opened = accumulator.EventAccumulator(str(folder)).Reload()
    assert [(e.step, e.value) for e in opened.Scalars("train/loss")] == [(n, float(n)) for n in range(1, 6)]

    metrics = MetricsFile(tmp_path / METRICS, tensorboard.Mirror(folder))
    metrics.rewind(3, [])
    for step in (4, 5):
        metrics({"step": step, "loss": 10.0 * step})
    expected = [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0), (5, 50.0)]
    for reader in (accumulator.EventAccumulator(str(folder)).Reload(), opened.Reload()):
        assert [(e.step, e.value) for e in reader.Scalars("train/loss")] == expected
        assert {"train/lr", "train/grad_norm", "speed/tokens_per_s", "memory/peak_gib"} < set(reader.Tags()["scalars"])
