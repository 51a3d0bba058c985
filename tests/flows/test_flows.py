"""The flows in this process, on real stages and a tiny model: what is built, what is reused, and how failures look."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows import chain
from flows.pretrain import pretrain
from flows.stages import stages
from flows.train import train
from magellano.errors import DiskFull, InputError
from magellano.names import Stage
from magellano.stages import quantize as quantize_stage
from tests.flows.site import ROOT, Site

BASE = ["tokenize for pretrain", "pretrain"]
EVERYTHING = ["tokenize", *BASE, "quantize", "attach_lora", "train", "checkpoint", "evaluate"]


def built(result: dict[str, Any]) -> list[str]:
    return [s["stage"] for s in result["stages"] if s["state"] == "built"]


def folder(result: dict[str, Any], stage: str) -> Path:
    return Path(next(s["path"] for s in result["stages"] if s["stage"] == stage))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.slow
def test_what_is_built_and_what_is_reused(tiny: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = train(profile=tiny)
    assert [s["stage"] for s in first["stages"]] == EVERYTHING == built(first)
    assert json.loads(json.dumps(first)) == first
    assert first["evaluation"]["fine_tuned"]["loss"] > 0
    assert {s["path"].split("/artifacts/")[0] for s in first["stages"]} == {str(home)}
    assert all((Path(s["path"]) / "manifest.json").is_file() for s in first["stages"])
    assert not list(home.rglob("*.pkl")) + list(home.rglob("*.pickle"))

    capsys.readouterr()
    second = train(profile=tiny)
    assert built(second) == []
    said = capsys.readouterr().err
    assert "nothing has changed: all 8 stages were reused, nothing was rebuilt" in said
    assert all(f"{stage:<12} reused" in said for stage in Stage)

    shorter = train(profile=tiny, overrides={"train.steps": 1})
    assert built(shorter) == ["train", "checkpoint", "evaluate"]
    assert folder(shorter, "quantize") == folder(first, "quantize")

    flip(folder(first, "quantize") / "model.safetensors")
    healed = train(profile=tiny)
    assert built(healed) == ["quantize"], "it came out the same, so nothing after it is built again"
    assert "is damaged: model.safetensors is not what was written (SHA-256 differs)" in capsys.readouterr().err

    again = train(profile=tiny, rerun=[Stage.ATTACH_LORA])
    assert built(again) == ["attach_lora", "train", "checkpoint", "evaluate"]

    alone = stages(stage=Stage.QUANTIZE, profile=tiny, rerun=True)
    assert [s["stage"] for s in alone["stages"]] == [*BASE, "quantize"]
    assert built(alone) == ["quantize"]

    base = pretrain(profile=tiny)
    assert [s["stage"] for s in base["stages"]] == BASE
    assert built(base) == []


@pytest.mark.slow
def test_rerunning_a_stage_rebuilds_what_depends_on_it_and_only_that(tiny: str, home: Path) -> None:
    after = {
        Stage.PRETRAIN: ["pretrain", "quantize", "attach_lora", "train", "checkpoint", "evaluate"],
        Stage.TOKENIZE: ["tokenize", "train", "checkpoint", "evaluate"],
        Stage.QUANTIZE: ["quantize", "attach_lora", "train", "checkpoint", "evaluate"],
        Stage.ATTACH_LORA: ["attach_lora", "train", "checkpoint", "evaluate"],
        Stage.TRAIN: ["train", "checkpoint", "evaluate"],
        Stage.CHECKPOINT: ["checkpoint", "evaluate"],
        Stage.EVALUATE: ["evaluate"],
    }
    assert set(after) == set(Stage)
    made = written(train(profile=tiny))
    for stage, rebuilt in after.items():
        result = train(profile=tiny, rerun=[stage])
        again = written(result)
        assert sorted(built(result)) == sorted(rebuilt), stage
        assert {name for name in made if made[name] != again[name]} == set(rebuilt), "by the folders' own times"
        made = again
    both = train(profile=tiny, rerun=[Stage.EVALUATE, Stage.ATTACH_LORA])
    assert sorted(built(both)) == sorted(after[Stage.ATTACH_LORA])


def written(result: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """For each stage its manifest's inode and time."""
    found = {s["stage"]: (Path(s["path"]) / "manifest.json").stat() for s in result["stages"]}
    return {name: (at.st_ino, at.st_mtime_ns) for name, at in found.items()}


@pytest.mark.slow
def test_the_disk_budget_is_held_by_what_may_go(tiny: str, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budget = {"disk.budget_gib": 1e-6}
    for rows in (60, 50, 40):
        result = stages(stage=Stage.TOKENIZE, profile=tiny, overrides={**budget, "data.max_rows": rows})
        assert folder(result, "tokenize").is_dir()
    assert len(list((home / "artifacts" / "tokenize").iterdir())) == 2, "the last two runs stay"
    said = capsys.readouterr().err
    assert said.count("disk.budget_gib: removed") == 1
    assert said.count("more than disk.budget_gib 1e-06, and nothing more may go") == 3


@pytest.mark.slow
def test_a_stage_of_an_earlier_run_is_carried_out_by_the_profile_that_it_kept(tiny: str, home: Path) -> None:
    first = train(profile=tiny, overrides={"train.steps": 1})
    Path(tiny).write_text("its owner has changed it")
    alone = stages(stage=Stage.CHECKPOINT, run=first["run"], rerun=True)
    assert built(alone) == ["checkpoint"]
    assert folder(alone, "checkpoint") == folder(first, "checkpoint")
    again = train(profile=str(home / "runs" / str(first["run"]) / "tiny.toml"))
    assert built(again) == [], "an old run can be repeated from its record"
    with pytest.raises(InputError, match="neither profile nor run"):
        stages(stage=Stage.TRAIN)
    with pytest.raises(InputError, match="9: no run of that number"):
        stages(stage=Stage.TRAIN, run=9)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"profile": "nope"}, r"unknown profile 'nope'"),
        (
            {"profile": "demo", "overrides": {"train.stepz": 1}},
            r"train\.stepz: unknown key; did you mean 'train\.steps'",
        ),
        ({"profile": "demo", "overrides": {"data.files": ["no/such.jsonl"]}}, r"no/such\.jsonl"),
    ],
)
def test_bad_input_is_one_line(
    arguments: dict[str, Any],
    told: str,
    home: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(InputError, match=told) as e:
        train(**arguments)
    assert "\n" not in str(e.value)
    assert "Traceback" not in capsys.readouterr().err
    assert [r.getMessage() for r in caplog.records if r.levelname == "ERROR"] == [], "the caller tells it, once"
    assert not list((home / "artifacts").rglob(".tmp-*"))


def test_a_full_disk_fails_the_flow_in_one_line(
    tiny: str, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(out: Path, *rest: Any) -> dict[str, Any]:
        (out / "half").write_bytes(bytes(5000))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(quantize_stage, "run", full)
    with pytest.raises(DiskFull, match="the disk is full"):
        stages(stage=Stage.QUANTIZE, profile=tiny)
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setenv("MAGELLANO_HOME", str(home))
    after = stages(stage=Stage.QUANTIZE, profile=tiny)
    assert built(after) == ["quantize"], "what was finished before the failure is kept"


def test_a_bug_keeps_its_traceback(
    tiny: str, home: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def bug(*args: Any) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(quantize_stage, "run", bug)
    with pytest.raises(KeyError):
        stages(stage=Stage.QUANTIZE, profile=tiny)
    assert any(record.exc_info for record in caplog.records)


STOPPED = """
import os, sys, time
from magellano import cli
from magellano.stages import tokenize

def asked(*given):
    os.kill(os.getpid(), int(sys.argv[1]))
    time.sleep(60)

tokenize.run = asked
sys.exit(cli.main(["train", sys.argv[2]]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_training_begins_ends_with_75(sent: signal.Signals, tiny: str, home: Path, site: Site) -> None:
    command = [sys.executable, "-c", STOPPED, str(sent.value), tiny]
    given = site.env | {"MAGELLANO_HOME": str(home)}
    done = subprocess.run(command, env=given, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 75, done.stderr
    assert done.stderr.splitlines()[-1] == "magellano: stopped; the next start continues from the finished stages"
    assert "Traceback" not in done.stderr
    assert not list((home / "artifacts").glob("*/*/manifest.json"))


def test_every_stage_can_be_reached() -> None:
    reachable: Callable[[chain.Chain, Stage], None] = chain.Chain.reach

    class Recorder:
        def __getattr__(self, name: str) -> str:
            asked.append(name)
            return name

    for stage in Stage:
        asked: list[str] = []
        reachable(Recorder(), stage)  # type: ignore[arg-type]
        assert len(asked) == 1, stage


def test_a_profile_without_pretraining_says_so(home: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \[pretrain\] section"):
        pretrain(profile="phase2")
