"""TensorBoard's event files are read back with tensorboardX's own messages; tests/peers asks TensorBoard itself."""

import importlib.util
import json
import logging
import signal
import struct
from pathlib import Path
from typing import Any

import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import masked_crc32c

from magellano import pipeline, tensorboard
from magellano.errors import InputError, Stopped
from magellano.metrics import MetricsFile
from magellano.names import METRICS, Stage
from magellano.profile import Profile, load_profile
from magellano.trainer import run_to_end
from tests.training import CONFIG, adapter_trainer, make_tokens, silent

ON = {"logging.tensorboard": True}


def events(folder: Path) -> list[Any]:
    """The events of the one file in the folder that is not empty, their checksums looked at."""
    assert len(list(folder.iterdir())) <= 2
    (path,) = (p for p in folder.iterdir() if p.stat().st_size)
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        head, body, tail = data[8:12], data[12 : 12 + length], data[12 + length : 16 + length]
        assert struct.unpack("<II", head + tail) == (masked_crc32c(data[:8]), masked_crc32c(body))
        found.append(event_pb2.Event.FromString(body))
        data = data[16 + length :]
    return found


def points(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Step and value of each tag."""
    found: dict[str, list[tuple[int, float]]] = {}
    for event in events(folder):
        for value in event.summary.value:
            found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def profile(tmp_path: Path, **more: Any) -> Profile:
    return load_profile("demo", ON | {"logging.folder": str(tmp_path / "shown")} | more)


def test_a_stopped_and_continued_training_has_each_point_once(tmp_path: Path) -> None:
    tokens, work = make_tokens(tmp_path / "tokens"), tmp_path / "train" / "0123456789abcdef"
    shown = tmp_path / "shown" / "demo" / "train-01234567"

    def stop_at_three(done: int, total: int, **facts: float | str) -> None:
        if done == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped):
        run_to_end(adapter_trainer(tokens), work, stop_at_three, tensorboard.mirror(profile(tmp_path), work))
    assert [step for step, _ in points(shown)["train/loss"]] == [1, 2, 3]
    with (work / METRICS).open("a") as f:
        f.write('{"step": 4, "loss": 9.0}\n')  # a kill lost the checkpoint behind it
    run_to_end(adapter_trainer(tokens), work, silent, tensorboard.mirror(profile(tmp_path), work))
    lines = [json.loads(line) for line in (work / METRICS).read_text().splitlines()]
    found = points(shown)
    assert set(found) == set(tensorboard.TAGS.values())
    for key, tag in tensorboard.TAGS.items():
        expected = [(line["step"], line[key]) for line in lines if key in line]
        assert [step for step, _ in found[tag]] == [step for step, _ in expected], f"{tag}: each once"
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in expected], rel=1e-6)
    assert [step for step, _ in found["train/loss"]] == list(range(1, CONFIG.steps + 1))
    assert events(shown)[1].session_log.status == event_pb2.SessionLog.START, "an open TensorBoard begins anew"


def test_what_is_taken_back_goes(tmp_path: Path) -> None:
    mirror = tensorboard.Mirror(tmp_path / "shown")
    metrics = MetricsFile(tmp_path / METRICS, mirror)
    metrics.rewind(0, [])
    for step in (1, 2, 3):
        metrics({"step": step, "loss": float("nan") if step == 2 else 1.0 / step})
    assert points(tmp_path / "shown")["train/loss"] == [(1, 1.0), (3, pytest.approx(1 / 3))]
    metrics.rewind(2, [{"step": 3, "why": "loss"}])
    metrics({"step": 3, "loss": 0.25})
    assert points(tmp_path / "shown")["train/loss"] == [(1, 1.0), (3, 0.25)]


def test_where_it_cannot_be_written_training_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "shown").write_text("in the way")
    metrics = MetricsFile(tmp_path / METRICS, tensorboard.Mirror(tmp_path / "shown"))
    with caplog.at_level(logging.WARNING):
        metrics.rewind(0, [])
        metrics({"step": 1, "loss": 1.0})
    assert len(caplog.records) == 1
    assert "goes on without it" in caplog.text
    assert json.loads((tmp_path / METRICS).read_text()) == {"step": 1, "loss": 1.0}


def test_it_is_local_and_off_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGELLANO_HOME", str(tmp_path))
    assert tensorboard.mirror(load_profile("demo"), tmp_path / "train" / "key") is None
    mirror = tensorboard.mirror(load_profile("demo", ON), tmp_path / "pretrain" / "0123456789")
    assert mirror is not None
    assert mirror.folder == tmp_path / "tensorboard" / "demo" / "pretrain-01234567"
    assert not (tmp_path / "tensorboard").exists()


def test_no_artifact_depends_on_it() -> None:
    plain, shown = load_profile("demo"), load_profile("demo", ON | {"logging.folder": "x", "notify.command": ["x"]})
    assert pipeline.fingerprint(plain, "d", "p", None) == pipeline.fingerprint(shown, "d", "p", None)
    for stage in Stage:
        assert pipeline.settings(stage, plain, plain.data) == pipeline.settings(stage, shown, shown.data)


def test_without_the_package_a_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tensorboard.check(load_profile("demo"))
    with pytest.raises(InputError, match=r"logging\.tensorboard needs .* pip install tensorboardX, or set it to false"):
        tensorboard.check(load_profile("demo", ON))
