"""Which runs' pages may go; that they go is tested on a real server in tests/flows/test_operate.py."""

import json
from pathlib import Path

import pytest

from magellano import history, registry
from magellano.artifacts import ArtifactRef
from magellano.errors import InputError
from magellano.ledger import Run
from magellano.names import Decision, Stage
from magellano.profile import load_profile
from magellano.registry import Entry


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAGELLANO_HOME", str(tmp_path))
    return tmp_path


def record(
    home: Path, flow_run: str, flow: str = "train", release: str = "", year: int = 2020, state: str = "done"
) -> int:
    with Run(flow, load_profile("demo"), flow_run, {}) as run:
        if release:
            ref = ArtifactRef(stage=Stage.CHECKPOINT, key=release, digest="0" * 64, bytes=1)
            run.stage(Stage.CHECKPOINT, ref, reused=False, seconds=0.0)
    path = home / "runs" / str(run.record.number) / "run.json"
    ended = None if state == "going" else f"{year}-01-01T00:00:00+00:00"
    started = f"{year}-01-01T00:00:00+00:00"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ended": ended, "started": started, "state": state}))
    return run.record.number


def judge(release: str, decision: Decision, run: int) -> None:
    facts = {"run": run, "decided": "", "reason": "", "made": "", "numbers": {}, "lineage": {}}
    with registry.changed() as book:
        book.shelf("demo").judge(Entry(release=release, digest="0" * 64, decision=decision, **facts))  # type: ignore[arg-type]


def test_old_ones_go_but_for_the_last_of_each_flow(home: Path) -> None:
    for name in "abcd":
        record(home, name)
    record(home, "night", flow="nightly")
    assert history.old(30) == ["a", "b"]
    assert history.old(30, keep=1) == ["a", "b", "c"]
    assert history.old(36000) == []


def test_young_ones_stay_and_one_that_died_counts_from_its_start(home: Path) -> None:
    record(home, "dead", state="going")  # nobody holds it
    record(home, "young", year=2999)
    for name in "ab":
        record(home, name)
    assert history.old(30) == ["dead"]


def test_whatever_was_ever_promoted_stays(home: Path) -> None:
    numbers = {name: record(home, name, release=name) for name in ("first", "aside", "second", "again")}
    record(home, "rebuilt", release="first")
    for name in "ab":
        record(home, name)
    judge("first", Decision.PROMOTED, numbers["first"])
    judge("aside", Decision.KEPT_ASIDE, numbers["aside"])
    judge("second", Decision.PROMOTED, numbers["again"])  # judged by another run than made it
    assert history.old(30) == ["aside"]


@pytest.mark.parametrize("text", ["", "x", "-1", "1e9", "99999"])
def test_a_number_of_days_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MAGELLANO_KEEP_DAYS", text)
    with pytest.raises(InputError, match="MAGELLANO_KEEP_DAYS="):
        history.keep_days()
    monkeypatch.delenv("MAGELLANO_KEEP_DAYS")
    assert history.keep_days() == history.DAYS
