"""Training in a child process: what kills the child is told apart and survived, in real processes."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magellano import artifacts, faults, isolation, loader, plan
from magellano.backend import mx, on_gpu
from magellano.data import shards
from magellano.errors import Aborted, InputError, OutOfMemory
from magellano.names import Fault, Recompute, Stage
from magellano.profile import Profile, load_profile
from magellano.progress import silent
from magellano.report import read_metrics
from magellano.stages import attach_lora, pretrain, quantize, train
from magellano.trainer import Trainer
from magellano.worker import FAULT
from tests.tiny import MODEL

ROOT = Path(__file__).parent.parent
PATIENCE = 300 if on_gpu() else 60  # seconds; on CUDA a process may compile for a minute
TINY = (
    MODEL
    + """[base]
source = "seeded"
[data]
format = "text"
files = ["nowhere.txt"]
seq_len = 16
[lora]
rank = 2
[train]
steps = 6
batch = 4
lr = 1e-2
warmup = 1
log_every = 1
checkpoint_every = 2
compute = "float32"
[pretrain.data]
format = "text"
files = ["nowhere.txt"]
[pretrain.train]
steps = 2
batch = 2
warmup = 1
log_every = 1
"""
)


@dataclass(frozen=True)
class Bench:
    """A tiny profile and what its training starts from."""

    file: Path
    profile: Profile
    folders: list[Path]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    root = tmp_path_factory.mktemp("bench")
    (root / "tiny.toml").write_text(TINY, encoding="utf-8")
    profile = load_profile(str(root / "tiny.toml"))
    folders = tokens, base, adapter = [root / name for name in ("tokens", "base", "adapter")]
    for folder in folders:
        folder.mkdir()
    rng = np.random.default_rng(0)
    for split, rows in (("train", 13), ("held_out", 3)):
        ids = rng.integers(0, 40, (rows, 17)).astype(np.uint16)
        reset = (rng.random((rows, 16)) < 0.15).astype(np.uint8)
        reset[:, 0] = 1
        counts = (rng.random((rows, 16)) < 0.7).astype(np.uint8)
        shards.write_split(tokens, split, [shards.Rows(ids[:, :-1], ids[:, 1:], counts, reset)])
    shards.write_facts(tokens, vocab_size=300, seq_len=16, rows={"train": 13, "held_out": 3})
    quantize.run(base, profile, None, silent)
    attach_lora.run(adapter, profile, base)
    return Bench(root / "tiny.toml", profile, folders)


@dataclass
class Ended:
    """A training's facts and files."""

    facts: dict[str, Any]
    out: Path

    @property
    def adapter(self) -> bytes:
        return (self.out / "adapter_model.safetensors").read_bytes()

    @property
    def losses(self) -> list[float]:
        return [line["loss"] for line in read_metrics(self.out / "metrics.jsonl") if "loss" in line]


def trained(bench: Bench, where: Path, fault: str = "") -> Ended:
    """The training in a child process, with a fault; `where` keeps the work folder of one call for the next."""
    out = where / "out"
    out.mkdir(parents=True, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        if fault:
            patch.setenv(FAULT, fault)
        return Ended(isolation.run(Stage.TRAIN, out, bench.profile, bench.folders, where / "work", silent), out)


@pytest.fixture(scope="module")
def whole(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The training in this process, without isolation."""
    root = tmp_path_factory.mktemp("whole")
    (root / "out").mkdir()
    return Ended(train.run(root / "out", bench.profile, *bench.folders, root / "work", silent), root / "out")


def test_it_is_the_same_training(bench: Bench, whole: Ended, tmp_path: Path) -> None:
    news: list[tuple[int, int]] = []
    facts = isolation.run(
        Stage.TRAIN, tmp_path, bench.profile, bench.folders, tmp_path / "work",
        lambda done, total, **facts: news.append((done, total)),
    )  # fmt: skip
    assert Ended(facts, tmp_path).adapter == whole.adapter
    assert facts.keys() == whole.facts.keys(), "nothing of faults where there was none"
    assert news == [(step, 6) for step in range(1, 7)]


def test_a_base_is_trained_so_too(bench: Bench, tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    pretrain.run(here, bench.profile, bench.folders[0], tmp_path / "a", silent)
    isolation.run(Stage.PRETRAIN, there, bench.profile, bench.folders[:1], tmp_path / "b", silent)
    assert (here / "model.safetensors").read_bytes() == (there / "model.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["mlx", "metal"])
def test_out_of_memory_goes_on_with_smaller_micro_batches(
    bench: Bench, whole: Ended, tmp_path: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Twice: 4 x 1 to 2 x 2 to 1 x 4, from the checkpoints of steps 2 and 4, along the same losses."""
    ended = trained(bench, tmp_path, f"{kind}@3#1,{kind}@5#2")
    assert (ended.facts["batch"], ended.facts["accumulate"], ended.facts["resumed_from"]) == (1, 4, 4)
    assert [(f["fault"], f["after_step"], f["batch"], f["then"]) for f in ended.facts["faults"]] == [
        (Fault.MEMORY, 3, 4, [2, 2]),
        (Fault.MEMORY, 5, 2, [1, 4]),
    ]
    np.testing.assert_allclose(ended.losses, whole.losses, rtol=2e-6)
    assert ended.adapter != whole.adapter, "the test would not see the same batches otherwise"
    said = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(said) == 2
    assert "with micro-batches of 2 instead of 4, 2 of them a step: the same gradient" in said[0]


def gradient(bench: Bench, adapter: Path, batch: int, accumulate: int) -> tuple[float, dict[str, np.ndarray]]:
    """Loss and summed gradient of one step."""
    config = bench.profile.train.model_copy(update={"batch": batch, "accumulate": accumulate})
    model = loader.load_release(adapter, bench.folders[1], config.compute)
    trainer, seen = Trainer(model, config, bench.folders[0], bench.profile.loss), {}
    consume = trainer.optimizer.consume

    def record(model: Any, grads: dict[str, Any], **how: Any) -> None:
        seen.update({name: np.array(g.astype(mx.float32), np.float64) for name, g in grads.items()})
        consume(model, grads, **how)

    trainer.optimizer.consume = record  # type: ignore[method-assign]
    return trainer.one_step().loss, seen


def test_a_crash_is_tried_again_without_the_kernels_that_mlx_kept(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kernels"
    kept.mkdir()
    for name in ("copy.ptx", "copy.txt", "copy.cu", "README"):
        (kept / name).touch()
    monkeypatch.setenv(isolation.MLX_KERNELS, str(kept))
    ended = trained(bench, tmp_path, "abort@3#1")
    assert [f["fault"] for f in ended.facts["faults"]] == [Fault.CRASHED]
    assert [path.name for path in kept.iterdir()] == ["README"]
    assert faults.of_text("RuntimeError: Failed to load compiled copy kernel: .") is Fault.GPU


@pytest.mark.parametrize("sizes", [(2, 2), (1, 4)])
def test_the_gradient_is_the_same_to_float32_rounding(bench: Bench, whole: Ended, sizes: tuple[int, int]) -> None:
    (loss, expected), (other, found) = gradient(bench, whole.out, 4, 1), gradient(bench, whole.out, *sizes)
    assert other == pytest.approx(loss, rel=5e-7)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.linalg.norm(value) > 0, name
        assert np.linalg.norm(found[name] - value) < 3e-6 * np.linalg.norm(value), name


def test_a_limit_that_the_profile_s_batch_breaks_is_kept_with_a_smaller_one(bench: Bench, tmp_path: Path) -> None:
    """No fault is injected here: the plan of 4 rows is refused, that of 2 is not."""

    least = bench.profile.train.model_copy(update={"loss_chunk": 1, "recompute": Recompute.ALWAYS})

    def sized(batch: int) -> Profile:
        return bench.profile.model_copy(update={"train": least.model_copy(update={"batch": batch})})

    two, four = (plan.fine_tune(sized(batch), on_gpu()).total / plan.GIB for batch in (2, 4))
    memory = bench.profile.memory.model_copy(update={"limit_gib": (two + four) / 2})
    tight = Bench(bench.file, sized(4).model_copy(update={"memory": memory}), bench.folders)
    facts = trained(tight, tmp_path).facts
    assert (facts["batch"], facts["accumulate"], facts["resumed_from"]) == (2, 2, 0)
    assert facts["faults"][0]["told"].startswith("profile tiny: training needs about")


def test_where_one_row_does_not_fit_the_stage_fails_in_one_line(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(OutOfMemory, match=r"train: out of memory after step 1 .*, with micro-batches of 1; lower") as e:
        trained(bench, tmp_path, "memory@1")
    assert "\n" not in str(e.value)
    record = json.loads((tmp_path / "work" / isolation.RECORD).read_text())["faults"]
    assert [fault["then"] for fault in record] == [[2, 2], [1, 4]]
    after = trained(bench, tmp_path)
    assert after.facts["batch"] == 1, "the next start does not try again what did not fit"


@pytest.mark.parametrize(("kind", "fault"), [("gpu", Fault.GPU), ("abort", Fault.CRASHED), ("kill", Fault.KILLED)])
def test_anything_else_is_tried_once_more_to_the_same_bits(
    bench: Bench, whole: Ended, tmp_path: Path, kind: str, fault: Fault
) -> None:
    if fault is Fault.KILLED and faults.kernel_kills() is None:
        pytest.skip("this system does not tell whether its kernel kills for want of memory")
    ended = trained(bench, tmp_path, f"{kind}@5#1")
    assert [(f["fault"], f["after_step"]) for f in ended.facts["faults"]] == [(fault, 5)]
    assert (ended.facts["batch"], ended.facts["resumed_from"]) == (4, 4)
    assert ended.adapter == whole.adapter


def test_the_second_time_the_stage_fails_and_the_next_start_continues(
    bench: Bench, whole: Ended, tmp_path: Path
) -> None:
    with pytest.raises(Aborted, match=r"train: crashed after step 3 \(SIGABRT\), for the second time") as e:
        trained(bench, tmp_path, "abort@3")
    assert "\n" not in str(e.value)
    after = trained(bench, tmp_path)
    assert after.facts["resumed_from"] == 2
    assert after.adapter == whole.adapter


def test_errors_pass_as_they_are_and_bugs_with_their_traceback(bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="a bug of the test") as e:
        trained(bench, tmp_path, "bug@1")
    assert "in _test_fault" in e.value.__notes__[0]
    nowhere = Bench(bench.file, bench.profile, [bench.folders[0], bench.folders[1], tmp_path / "nowhere"])
    with pytest.raises(InputError, match="nowhere") as wrong:
        trained(nowhere, tmp_path)
    assert not hasattr(wrong.value, "__notes__")


def test_what_the_child_says_is_passed_on(
    bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    trained(bench, tmp_path, "gpu@5#1")
    assert "Caused GPU Hang Error" in capsys.readouterr().err
    damaged = tmp_path / "work" / "step-000000006" / "parameters.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    caplog.clear()
    trained(bench, tmp_path)
    assert any(r.name == "magellano.state" and "is damaged" in r.getMessage() for r in caplog.records)


def test_a_damaged_record_is_told_of(bench: Bench, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "work").mkdir()
    for text in ('{"faults": [', '{"faults": [{"then": 3}]}', "[]"):
        (tmp_path / "work" / isolation.RECORD).write_text(text)
        caplog.clear()
        assert isolation._Survived(tmp_path / "work" / isolation.RECORD).sizes is None
        assert "is not readable" in caplog.text


PARENT = """
import sys
from pathlib import Path
from magellano import isolation
from magellano.artifacts import Store
from magellano.errors import Stopped
from magellano.names import Stage
from magellano.profile import load_profile
home, profile, folders = Path(sys.argv[1]), load_profile(sys.argv[2]), [Path(f) for f in sys.argv[3:]]
store = Store(home)
def make(out):
    news = lambda done, total, **facts: print(done, flush=True)
    lock = store.lock(Stage.TRAIN, "k")
    return isolation.run(Stage.TRAIN, out, profile, folders, store.work(Stage.TRAIN, "k"), news, lock)
try:
    built = store.build(Stage.TRAIN, "k", version=1, inputs={}, config={}, make=make)
    print("resumed from", store.manifest(built.ref)["summary"]["resumed_from"])
except Stopped as e:
    print(e)
    sys.exit(75)
"""


def parent(bench: Bench, home: Path, fault: str = "") -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PARENT, str(home), str(bench.file), *map(str, bench.folders)]
    env = os.environ | ({FAULT: fault} if fault else {})
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=env)


def child_of(pid: int) -> int:
    (child,) = (int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
    return child


def gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


SLOW = "sleep@*"  # half a second a step


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_handed_on_and_the_step_is_kept(bench: Bench, tmp_path: Path, sent: signal.Signals) -> None:
    first = parent(bench, tmp_path, SLOW)
    assert first.stdout
    assert first.stdout.readline() == "1\n"
    for _ in range(3):  # a second one changes nothing
        first.send_signal(sent)
        time.sleep(0.05)
    said = first.communicate(timeout=PATIENCE)[0]
    assert first.returncode == 75
    assert "stopped at step" in said
    second = parent(bench, tmp_path)
    resumed = second.communicate(timeout=PATIENCE)[0].splitlines()[-1]
    assert resumed in ("resumed from 1", "resumed from 2"), "what was not at a multiple of checkpoint_every"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_killed_parent_s_child_saves_ends_and_holds_the_lock_until_then(bench: Bench, tmp_path: Path) -> None:
    first = parent(bench, tmp_path, SLOW)
    assert first.stdout
    assert first.stdout.readline() == "1\n"
    child = child_of(first.pid)
    first.kill()
    first.wait()
    assert artifacts.Store(tmp_path)._try_lock(Stage.TRAIN, "k") is None, "the child still trains"
    second = parent(bench, tmp_path)
    said, warned = second.communicate(timeout=PATIENCE)
    assert gone(child)
    assert said.splitlines()[-1] in ("resumed from 1", "resumed from 2")
    assert second.returncode == 0, warned


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPU...)", Fault.MEMORY),
        ("[metal::malloc] Unable to allocate 96905199616 bytes.", Fault.MEMORY),
        ("Attempting to allocate 9 bytes which is greater than the maximum allowed buffer size of 8", Fault.MEMORY),
        ("cudaMallocAsync(&data, size, stream) failed: out of memory", Fault.MEMORY),
        ("terminate called after throwing an instance of 'std::bad_alloc'", Fault.MEMORY),
        ("[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002)", Fault.GPU),
        ("cudaStreamSynchronize(s) failed: an illegal memory access was encountered", Fault.GPU),
        ("CUDA error: unspecified launch failure", Fault.GPU),
        ("shapes (2,3) and (4,5) cannot be multiplied", None),
        ("invalid argument: memory order", None),
    ],
)
def test_messages_are_told_apart(text: str, fault: Fault | None) -> None:
    assert faults.of_text(text) is fault


@pytest.mark.parametrize(
    ("code", "tail", "kernel_killed", "fault", "told"),
    [
        (-9, "", True, Fault.MEMORY, "SIGKILL by the kernel, which had no memory left"),
        (-9, "", None, Fault.MEMORY, "SIGKILL"),
        (-9, "", False, Fault.KILLED, "SIGKILL"),
        (-6, "step\nstd::bad_alloc\nend\n", False, Fault.MEMORY, "SIGABRT: std::bad_alloc"),
        (-11, "hello\n", False, Fault.CRASHED, "SIGSEGV"),
        (1, "hello\n", False, Fault.CRASHED, "exit code 1"),
        (-33, "", False, Fault.CRASHED, "signal 33"),
    ],
)
def test_ends_are_told_apart(code: int, tail: str, kernel_killed: bool | None, fault: Fault, told: str) -> None:
    assert faults.of_exit(code, tail, kernel_killed) == (fault, told)


@pytest.mark.parametrize(
    ("sizes", "then"), [((8, 1), (4, 2)), ((6, 3), (3, 6)), ((9, 1), (3, 3)), ((5, 2), (1, 10)), ((1, 4), None)]
)
def test_the_rows_of_a_step_stay(sizes: tuple[int, int], then: tuple[int, int] | None) -> None:
    assert isolation._smaller(*sizes) == then
