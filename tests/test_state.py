"""Checkpoints: which stay, which are trusted, what a full disk and other versions end with, and one of this release."""

import hashlib
import importlib.util
import json
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import load_file

from magellano import durable, state
from magellano.backend import mx, on_gpu, tree_flatten, tree_unflatten
from magellano.errors import DiskFull, ExitCode, InputError
from magellano.guard import Guard, NotFinite
from magellano.trainer import LossScale, Trainer, run_to_end
from tests.training import CONFIG, adapter_trainer, digest, make_tokens, silent

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return make_tokens(tmp_path / "tokens")


def save(folder: Path, step: int, held_out: float | None = None, elements: int = 100) -> None:
    tensors = {"a": mx.full((elements,), float(step))}
    state.save(folder, step, tensors, tensors, {state.HELD_OUT: held_out})


def steps(folder: Path) -> list[int]:
    return [int(p.name.removeprefix(state.PREFIX)) for p in state.by_step(folder)]


def test_the_last_two_and_the_best_stay(tmp_path: Path) -> None:
    for step, loss in ((1, 5.0), (2, 3.0), (3, 3.0), (4, None), (5, 4.0), (6, None)):
        save(tmp_path, step, loss)
    assert steps(tmp_path) == [2, 5, 6]
    best = state.best(tmp_path)
    assert best is not None
    assert (best[0].name, best[1]) == ("step-000000002", 3.0)
    save(tmp_path, 7, 2.5)
    save(tmp_path, 8)
    save(tmp_path, 9)
    assert steps(tmp_path) == [7, 8, 9]


def test_the_best_of_a_run_survives_it(tokens: Path, tmp_path: Path) -> None:
    """A rate far too high: the held-out loss is best early on."""
    update = {"steps": 10, "lr": 0.3, "warmup": 0, "min_lr_ratio": 1.0, "evaluate_every": 1, "checkpoint_every": 3}
    trainer = adapter_trainer(tokens, CONFIG.model_copy(update=update))
    run_to_end(trainer, tmp_path / "work", silent)
    lines = [json.loads(line) for line in (tmp_path / "work" / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["held_out_loss"] for line in lines if "held_out_loss" in line}
    assert list(losses) == list(range(1, 11))
    lowest = min(losses, key=lambda step: losses[step])
    assert lowest < 7, "else it is among the last two anyway"
    best = state.best(tmp_path / "work")
    assert best is not None
    assert best == (tmp_path / "work" / f"step-{lowest:09d}", losses[lowest])
    assert steps(tmp_path / "work") == [lowest, 9, 10]
    other = adapter_trainer(tokens, CONFIG)
    other._restore(state._read(best[0]), tmp_path)
    assert other.held_out_loss() == losses[lowest], "it is the state that was measured"


def test_order_is_by_step_never_by_clock(tmp_path: Path) -> None:
    for step in (3, 1, 2):
        tensors = {"a": mx.full((4,), step)}
        state.save(tmp_path / str(step), step, tensors, tensors, {})
        (tmp_path / str(step) / f"step-{step:09d}").rename(tmp_path / f"step-{step:09d}")
    os.utime(tmp_path / "step-000000001", (2e9, 2e9))
    (tmp_path / "step-9").mkdir()
    (tmp_path / "step-999999999x").mkdir()
    found = state.latest(tmp_path)
    assert found is not None
    assert found.step == 3
    assert found.parameters["a"].tolist() == [3] * 4
    before = state.latest(tmp_path, at_most=2)
    assert before is not None
    assert before.step == 2


def test_before_an_old_one_goes_the_one_before_the_last_is_hashed_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)
    flip(tmp_path / "step-000000002" / state.OPTIMIZER, -1, 0)
    save(tmp_path, 3)
    assert steps(tmp_path) == [1, 3], "two that are sound"
    assert "step-000000002 is damaged (optimizer.safetensors is not what was written" in caplog.text


def flip(path: Path, byte: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def test_every_flipped_bit_and_every_cut_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1, 2.5)
    caplog.set_level(logging.CRITICAL)
    save(tmp_path, 2, 3.5)
    path, rng = tmp_path / "step-000000002", random.Random(0)
    kept = {p.name: p.read_bytes() for p in path.iterdir()}
    seal = [(state.SEAL, n, bit) for n in range(len(kept[state.SEAL])) for bit in (0, 3, 5)]
    others = [
        (name, rng.randrange(len(kept[name])), rng.randrange(8))
        for name in (state.PARAMETERS, state.OPTIMIZER)
        for _ in range(200)
    ]
    for name, byte, bit in seal + others:
        flip(path / name, byte, bit)
        assert durable.damage(path, state.SEAL) is not None, (name, byte, bit)
        (path / name).write_bytes(kept[name])
    for name, data in kept.items():
        for length in (0, 1, 8, len(data) // 2, len(data) - 1):
            os.truncate(path / name, length)
            found = state.latest(tmp_path)
            assert found is not None
            assert found.step == 1, (name, length)
            (tmp_path / (state.ASIDE + path.name)).rename(path)
            (path / name).write_bytes(data)
    found = state.latest(tmp_path)
    assert found is not None
    assert found.step == 2, "untouched it is sound"


def test_a_checkpoint_under_another_steps_name_is_damaged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 1)
    (tmp_path / "step-000000001").rename(tmp_path / "step-000000009")
    assert state.latest(tmp_path) is None
    assert "checkpoint.json is that of step 1" in caplog.text


@pytest.mark.parametrize("schema", [1, 3])
def test_another_versions_checkpoint_is_refused_and_stays(tmp_path: Path, schema: int) -> None:
    save(tmp_path, 1)
    path = tmp_path / "step-000000001"
    facts = json.loads((path / state.SEAL).read_text())
    (path / state.SEAL).unlink()
    durable.seal(path, state.SEAL, facts | {"schema": schema})
    if schema == 1:  # that version did not seal its seals
        facts = json.loads((path / state.SEAL).read_text())
        del facts[durable.SELF]
        (path / state.SEAL).write_text(json.dumps(facts))
    with pytest.raises(InputError, match=f"step-000000001: checkpoint schema {schema}, this version reads 2; finish"):
        state.latest(tmp_path)
    assert path.is_dir()


def test_another_runs_checkpoint_is_refused(tokens: Path, tmp_path: Path) -> None:
    save(tmp_path / "work", 1)
    with pytest.raises(InputError, match="the checkpoint of step 1 is another run's"):
        adapter_trainer(tokens).resume(tmp_path / "work")


def test_a_state_that_is_not_finite_is_never_saved(tokens: Path, tmp_path: Path) -> None:
    trainer = adapter_trainer(tokens)
    trainer.one_step()
    trainer.save(tmp_path / "work")
    trainer.one_step()
    states = dict(tree_flatten(trainer.optimizer.state))
    name = next(name for name in states if name.endswith(".s"))
    trainer.optimizer.state = tree_unflatten(list((states | {name: states[name] + float("inf")}).items()))
    with pytest.raises(NotFinite, match="the state after step 2 is not finite"):
        trainer.save(tmp_path / "work")
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["step-000000001"]


# a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("may not mount")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_fills_up_ends_with_the_bytes_needed_and_the_old_ones_whole(small_disk: Path) -> None:
    save(small_disk, 1, elements=20_000)
    save(small_disk, 2, elements=20_000)
    kept = {p: p.read_bytes() for p in small_disk.rglob("*") if p.is_file()}
    (small_disk / "other").write_bytes(bytes(shutil.disk_usage(small_disk).free - 100_000))
    with pytest.raises(DiskFull, match=r"the disk is full: at least 1,208,576 bytes are needed and [\d,]+ are fr") as e:
        save(small_disk, 3, elements=20_000)
    assert e.value.exit_code == ExitCode.FAILED
    assert "\n" not in str(e.value)
    assert {p: p.read_bytes() for p in small_disk.rglob("*") if p.is_file() and p.name != "other"} == kept
    (small_disk / "other").unlink()
    found = state.latest(small_disk)
    assert found is not None
    assert found.step == 2
    save(small_disk, 3, elements=20_000)
    assert steps(small_disk) == [2, 3]


@pytest.mark.skipif(sys.platform == "darwin", reason="macOS keeps the signal's default")
def test_files_that_may_not_grow_end_likewise(tmp_path: Path) -> None:
    save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(DiskFull, match=r"files may not grow so large: at least 9,048,576 bytes are needed"):
            save(tmp_path, 2, elements=1_000_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]
    assert durable.damage(tmp_path / "step-000000001", state.SEAL) is None


def test_a_run_without_room_for_its_checkpoints_does_not_start(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = adapter_trainer(tokens, CONFIG.model_copy(update={"checkpoint_every": 6}))
    states = dict(tree_flatten(trainer.optimizer.state))
    one = state.size(trainer.tensors(), states)
    assert one - state.OVERHEAD == 3 * 4 * sum(a.size for a in trainer.tensors().values()) + 4
    assert trainer.room(tmp_path) == 2 * one, "that of step 0 and the last"
    often = adapter_trainer(tokens, CONFIG.model_copy(update={"evaluate_every": 2}))
    assert often.room(tmp_path) == 4 * one, "two, the best, and one being written"
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * one - 1))
    with pytest.raises(DiskFull, match=f"at least {2 * one:,} bytes are needed and {2 * one - 1:,} are free"):
        run_to_end(trainer, tmp_path / "work", silent)
    assert trainer.step == 0
    assert list((tmp_path / "work").iterdir()) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * one))
    run_to_end(trainer, tmp_path / "work", silent)


# the checkpoint of this release


def golden() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_checkpoint", GOLDEN / "make_checkpoint.py")
    assert spec is not None
    assert spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


@pytest.fixture
def work(tmp_path: Path) -> Path:
    shutil.copytree(GOLDEN / "checkpoint", tmp_path / "work")
    return tmp_path / "work"


def test_the_golden_checkpoint_is_read_to_the_bit(work: Path) -> None:
    told = json.loads((GOLDEN / "checkpoint.json").read_text())
    found = state.latest(work)
    assert found is not None
    assert found.step == golden().AT
    assert {k: v for k, v in found.facts.items() if k not in ("files", durable.SELF)} == told["facts"]
    read = {
        f"{kind}/{name}": [str(np.array(a).dtype), list(a.shape), hashlib.sha256(np.array(a).tobytes()).hexdigest()]
        for kind, tensors in (("parameters", found.parameters), ("optimizer", found.optimizer))
        for name, a in tensors.items()
    }
    assert read == told["tensors"]
    assert told["facts"]["guard"]["passed"] == list(golden().POISON)
    assert found.optimizer["step"].item() > 1


def by_hand(trainer: Trainer, path: Path) -> None:
    """The state in `path`, read by the safetensors package, put into `trainer` piece by piece."""
    facts = json.loads((path / state.SEAL).read_text())
    both = [load_file(path / name) for name in (state.PARAMETERS, state.OPTIMIZER)]
    parameters, states = ([(name, mx.array(a)) for name, a in tensors.items()] for tensors in both)
    trainer.model.update(tree_unflatten(parameters))
    trainer.optimizer.state = tree_unflatten(states)
    trainer.step, trainer.tokens = facts["step"], facts["tokens"]
    trainer.scale, trainer.guard = LossScale(**facts["loss_scale"]), Guard(**facts["guard"])
    trainer._follow_schedule()


@pytest.mark.skipif(on_gpu(), reason="bits are promised for CPUs alone")
def test_a_training_resumes_from_the_golden_checkpoint_to_the_bit(tokens: Path, work: Path) -> None:
    config = golden().config()
    reference = adapter_trainer(tokens, config)
    by_hand(reference, work / f"step-{golden().AT:09d}")
    while reference.step < config.steps:
        reference.one_step()
    trainer = adapter_trainer(tokens, config)
    start = digest(trainer)
    facts = run_to_end(trainer, work, silent)
    assert facts["resumed_from"] == golden().AT
    assert facts["rollbacks"] == json.loads((GOLDEN / "checkpoint.json").read_text())["facts"]["guard"]["rollbacks"]
    assert digest(trainer) == digest(reference) != start
