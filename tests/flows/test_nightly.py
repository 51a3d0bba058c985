"""Nights with a tiny model: data that help are promoted, data that harm are kept aside, nothing new trains nothing."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from flows import nightly as flow
from flows.nightly import nightly
from flows.train import train
from magellano import artifacts, cli, gate, ledger, registry
from magellano.errors import ExitCode, InputError
from magellano.names import Decision, RunState, Stage
from magellano.runs import Release
from tests.tiny import MODEL

ANIMALS = ["cat", "dog", "fox", "owl", "bee", "elk", "ant", "hen"]  # by the name's last letter: something to learn
PROFILE = (
    MODEL
    + """
[data]
format = "completions"
files = ["DATA"]
seq_len = 64
held_out = 0.2

[lora]
rank = 4

[train]
steps = 100
batch = 4
lr = 0.02
warmup = 2

[evaluate]
samples = 0
"""
)


@pytest.fixture
def site(tmp_path: Path, home: Path) -> Path:
    """A folder with nights.toml and data/."""
    (tmp_path / "data").mkdir()
    (tmp_path / "nights.toml").write_text(PROFILE.replace("DATA", str(tmp_path / "data")), encoding="utf-8")
    return tmp_path


def put(site: Path, name: str, seed: int, count: int, wrong: bool = False) -> None:
    """A file of rows. `wrong`: completions that have nothing to do with the prompts."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        who = "".join(draw.choice("abcdefgh") for _ in range(4))
        text = f" the {ANIMALS['abcdefgh'.index(who[-1])]}, said {who}."
        if wrong:
            text = "".join(draw.choice("QXZWVKJ") for _ in range(24))
        rows.append(json.dumps({"prompt": f"{who}:", "completion": text}))
    (site / "data" / name).write_text("\n".join(rows) + "\n", encoding="utf-8")


def night(site: Path, **more: Any) -> dict[str, Any]:
    result: dict[str, Any] = nightly(profile=str(site / "nights.toml"), **more)  # type: ignore[assignment]
    return result


def shelf() -> registry.Shelf:
    return registry.read().profiles["nights"]


@pytest.mark.slow
def test_the_gate_with_data_that_help_and_data_that_harm(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(site, "a.jsonl", 1, 24)
    first = night(site)
    assert first["gate"]["decision"] == Decision.PROMOTED, first["gate"]["reason"]
    fixed = first["gate"]["numbers"]["held_out"]

    capsys.readouterr()
    idle = night(site)
    assert idle["stages"] == []
    assert "nothing new since run 1" in idle["nothing_new"]
    assert "no training: nothing new since run 1" in capsys.readouterr().err
    assert ledger.find("2").state is RunState.NOTHING_NEW

    put(site, "b.jsonl", 2, 300)
    helped = night(site)
    assert helped["gate"]["decision"] == Decision.PROMOTED, helped["gate"]["reason"]
    assert "new: b.jsonl" in ledger.find("3").why
    numbers = helped["gate"]["numbers"]
    assert numbers["held_out"] == fixed, "the set that decides does not move with the data"
    assert numbers["candidate"]["tokens"] == numbers["promoted"]["tokens"] == numbers["base"]["tokens"]
    assert numbers["candidate"]["loss"] < 0.9 * numbers["promoted"]["loss"]
    assert numbers["promoted"] == first["gate"]["numbers"]["candidate"], "measured again, the same"

    put(site, "c.jsonl", 3, 400, wrong=True)
    harmed = night(site)
    assert harmed["gate"]["decision"] == Decision.KEPT_ASIDE
    assert "higher than the promoted adapter's" in harmed["gate"]["reason"]
    assert harmed["gate"]["in_force"] == helped["gate"]["release"] == shelf().current
    assert "nothing new since run 4" in night(site)["nothing_new"], "what was judged is not judged again"

    entry = shelf().entry(harmed["gate"]["release"])
    assert entry is not None
    assert entry.decision is Decision.KEPT_ASIDE
    assert (artifacts.home() / "artifacts" / Stage.CHECKPOINT / entry.release).is_dir(), "kept aside, not thrown away"
    made = shelf().entry(helped["gate"]["release"])
    assert made is not None
    assert set(made.lineage["data"]["files"]) == {"a.jsonl", "b.jsonl"}
    assert made.lineage["data"]["rows"][str(site / "data" / "b.jsonl")] == 300
    assert made.lineage["settings"]["train"]["steps"] == 100
    assert made.lineage["base"]["key"] in " ".join(made.lineage["artifacts"])
    assert {name.split("/")[0] for name in made.lineage["artifacts"]} == set(Stage) - {Stage.PRETRAIN, Stage.EVALUATE}
    commit = artifacts.code_version()["commit"]
    assert made.lineage["code"]["trained_by"]["commit"] == commit == made.lineage["code"]["commit"]

    by_hand(site, first["gate"]["release"], helped["gate"]["release"], capsys)
    by_profile(site, capsys)


def by_hand(site: Path, first: str, helped: str, capsys: pytest.CaptureFixture[str]) -> None:
    """rollback, and what a night makes of it; gc leaves what may come into force again."""
    back = Decision.ROLLED_BACK
    capsys.readouterr()
    assert cli.main(["rollback", "--json"]) == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["release"] == first == shelf().current
    assert "nothing_new" in night(site), "a night does not undo a rollback"
    again = night(site, force=True)
    assert again["gate"]["decision"] == Decision.KEPT_ASIDE, "still worse than the first"
    assert cli.main(["rollback", helped[:10]]) == ExitCode.DONE
    assert shelf().current == helped
    assert Release.find("nights@promoted").folder.name == helped
    with pytest.raises(InputError, match="other: no promoted adapter of this profile"):
        Release.find("other@promoted")
    assert cli.main(["gc", "--yes", "--keep", "1"]) == ExitCode.DONE
    assert cli.main(["rollback", "nights"]) == ExitCode.DONE
    assert shelf().current == first
    happened = [event.decision for event in shelf().history]
    assert happened == [Decision.PROMOTED] * 2 + [Decision.KEPT_ASIDE, back, Decision.KEPT_ASIDE, back, back]
    (artifacts.home() / "artifacts" / Stage.CHECKPOINT / helped / "adapter_model.safetensors").unlink()
    assert cli.main(["rollback", helped]) == ExitCode.BAD_INPUT
    assert "is damaged" in capsys.readouterr().err
    assert shelf().current == first, "what cannot be used does not come into force"


def by_profile(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A night that would train on what it is judged by is refused before anything trains."""
    with pytest.raises(InputError, match=r"split otherwise than the fixed held-out set \(data\.seed 7, then 0\)"):
        night(site, overrides={"data.seed": 7})
    assert ledger.records()[-1].state is RunState.FAILED
    other = train(profile=str(site / "nights.toml"), overrides={"data.seed": 7, "train.steps": 2, "train.warmup": 1})
    release = next(s["key"] for s in other["stages"] if s["stage"] == Stage.CHECKPOINT)
    assert cli.main(["promote", release, "--reason", "another split"]) == ExitCode.DONE
    assert release[:8] in capsys.readouterr().out
    entry, held_out = shelf().entry(release), shelf().held_out
    assert entry is not None
    assert (entry.reason, entry.run, shelf().current) == ("another split", None, release)
    assert held_out is not None
    assert held_out.split["seed"] == 7
    better = night(site, overrides={"data.seed": 7})
    assert better["gate"]["numbers"]["held_out"] == held_out.ref.key
    assert better["gate"]["numbers"]["promoted"] == {k: entry.numbers["candidate"][k] for k in gate.MEASURES}


def test_the_wait_depends_on_the_run_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(flow.time, "sleep", slept.append)

    def start(run: str, count: int, minutes: float, scheduled: bool = True) -> None:
        monkeypatch.setattr(flow, "scheduled", lambda: scheduled)

        class Run:
            id, run_count = run, count

        monkeypatch.setattr(flow, "flow_run", Run)
        flow.wait(minutes)

    for run in ("one", "two", "one"):
        start(run, 1, 20)
    assert slept[0] == slept[2] != slept[1]
    assert all(0 < seconds < 20 * 60 for seconds in slept)
    start("one", 2, 20)
    start("one", 1, 0)
    start("one", 1, 20, scheduled=False)
    assert len(slept) == 3, "a retry does not wait again, nor a run without jitter, nor one that a person started"
