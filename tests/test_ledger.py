"""What a run leaves behind, however it ends, and what `runs`, `show` and `diff` make of it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from magellano import cli, ledger
from magellano.artifacts import ArtifactRef
from magellano.errors import ExitCode, InputError, Stopped
from magellano.ledger import Run
from magellano.names import RunState, Stage
from magellano.profile import load_profile

ROOT = Path(__file__).parent.parent
REF = ArtifactRef(stage=Stage.TRAIN, key="abc", digest="def", bytes=3)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAGELLANO_HOME", str(tmp_path))
    return tmp_path


def run(flow_run: str = "x", flow: str = "train", **overrides: Any) -> Run:
    return Run(flow, load_profile("demo", overrides), flow_run, {"profile": "demo", "overrides": overrides})


def failing(run: Run, error: Exception, seconds: float = 0.0) -> None:
    """A run that ends with `error` after a while."""

    def go() -> None:
        with run:
            time.sleep(seconds)
            raise error

    with pytest.raises(type(error)):
        go()


def test_a_run_keeps_what_is_needed_to_repeat_it(home: Path) -> None:
    with run(**{"train.steps": 70, "data.files": ['odd "name"\\.jsonl']}) as first:
        first.stage("train", REF, reused=False, seconds=1.5)
        first.say(numbers={"loss": 2.5})
    record = ledger.find("1")
    assert record.state is RunState.DONE
    assert record.ended is not None
    assert (record.flow, record.profile, record.asked["overrides"]["train.steps"]) == ("train", "demo", 70)
    assert [(s.name, s.ref, s.reused, s.seconds) for s in record.stages] == [("train", REF, False, 1.5)]
    assert record.numbers == {"loss": 2.5}
    assert record.code == ledger.code()
    assert record.took is not None
    assert record.took["seconds"] > 0
    assert record.took["estimated"] is ("estimate" in record.took["by"])
    kept = load_profile(ledger.profile_file(record))
    assert kept == load_profile("demo", {"train.steps": 70, "data.files": ['odd "name"\\.jsonl']})
    lock = (home / "runs" / "locks" / f"{record.lock}.txt").read_text()
    assert (ROOT / "requirements.lock").read_text() in lock
    with run("y"):
        pass
    assert ledger.find("2").lock == record.lock
    assert len(list((home / "runs" / "locks").iterdir())) == 1, "a lock is kept once"


@pytest.mark.parametrize(
    ("error", "state", "why"),
    [
        (InputError("a.jsonl: row 3: no text"), RunState.FAILED, "a.jsonl: row 3: no text"),
        (KeyError("bug"), RunState.FAILED, "'bug'"),
        (Stopped("stopped at step 3 of 9"), RunState.STOPPED, "stopped at step 3 of 9"),
        (KeyboardInterrupt(), RunState.STOPPED, "KeyboardInterrupt"),
    ],
)
def test_how_it_ended(error: BaseException, state: RunState, why: str) -> None:
    with pytest.raises(type(error)), run():
        raise error
    record = ledger.find("demo")
    assert (record.state, record.why) == (state, why)
    assert record.took is not None


def test_a_retry_goes_on_under_its_number() -> None:
    failing(run("a"), InputError("no"), seconds=0.05)
    before = ledger.find("1")
    with run("b"):
        pass
    with run("a"):
        time.sleep(0.05)
    (first, second) = ledger.records()
    assert (first.number, first.attempts, first.state) == (1, 2, RunState.DONE)
    assert (second.number, second.attempts) == (2, 1)
    assert first.started == before.started
    assert first.took is not None
    assert first.took["seconds"] >= 0.1, "both attempts cost"


def test_one_that_was_killed_is_told_from_one_that_goes_on() -> None:
    code = """
import sys, time
from magellano.ledger import Run
from magellano.profile import load_profile
with Run("train", load_profile("demo"), "x", {}):
    print("going", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "going\n"
        assert ledger.find("1").state is RunState.GOING
        with ledger.alone() as nobody:
            assert not nobody
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert ledger.find("1").state is RunState.DIED
    with ledger.alone() as nobody:
        assert nobody
    with run("x"):
        pass
    assert ledger.find("1").state is RunState.DONE
    assert ledger.find("1").attempts == 2


def test_a_damaged_record_is_left_out_with_a_warning(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in "ab":
        with run(name):
            pass
    (home / "runs" / "1" / "run.json").write_text('{"number": "one"}')
    assert [r.number for r in ledger.records()] == [2]
    assert "left out, it is no record of a run" in caplog.text
    with run("c"):
        pass
    assert ledger.records()[-1].number == 3
    with pytest.raises(InputError, match=r"9: no run of that number or profile .* there is 2 \(demo\), 3 \(demo\)"):
        ledger.find("9")


def command(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    assert cli.main([*argv, "--json"]) == ExitCode.DONE
    facts: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert cli.main([*argv]) == ExitCode.DONE
    facts["said"] = capsys.readouterr().out
    return facts


@pytest.fixture
def three() -> None:
    """A training, another with other settings and data, and a night that promoted."""
    with run("a") as one:
        one.say(data={"x.jsonl": "1" * 64, "y.jsonl": "2" * 64}, numbers={"loss": 2.0, "perplexity": 8.0})
        one.stage("train", REF, reused=False, seconds=61.0)
    two = run("b", **{"train.steps": 70})
    two.say(data={"x.jsonl": "3" * 64, "z.jsonl": "4" * 64}, numbers={"loss": 3.0, "perplexity": 8.0})
    failing(two, Stopped("stopped at step 3 of 7"))
    with run("c", "nightly") as night:
        night.say(gate={"decision": "promoted", "reason": "it is better"})


def test_runs_filters(three: None, capsys: pytest.CaptureFixture[str]) -> None:
    def found(*argv: str) -> list[int]:
        return [r["number"] for r in command(capsys, "runs", *argv)["runs"]]

    assert found() == [1, 2, 3]
    assert found("--flow", "train") == [1, 2]
    assert found("--state", "stopped") == [2]
    assert found("--decision", "promoted") == [3]
    assert found("--last", "2") == [2, 3]
    assert found("--profile", "phase1") == []
    said = command(capsys, "runs")["said"]
    assert "nightly demo" in said
    assert "2.0000" in said


def test_show_tells_all(three: None, capsys: pytest.CaptureFixture[str]) -> None:
    facts = command(capsys, "show", "1")
    assert facts["there"] == {"train/abc": False}
    assert Path(facts["profile_file"]).is_file()
    assert Path(facts["lock_file"]).is_file()
    assert "removed since" in facts["said"]
    assert "1 min 01 s" in facts["said"]
    assert "promoted: it is better" in command(capsys, "show", "demo")["said"], "the newest"
    assert "stopped at step 3 of 7" in command(capsys, "show", "#2")["said"]


def test_diff_shows_what_differs_and_only_that(three: None, capsys: pytest.CaptureFixture[str]) -> None:
    facts = command(capsys, "diff", "1", "2")
    assert facts["settings"] == {"train.steps": [load_profile("demo").train.steps, 70]}
    assert facts["data"] == {
        "file x.jsonl": ["1" * 16, "3" * 16], "file y.jsonl": ["2" * 16, None], "file z.jsonl": [None, "4" * 16],
    }  # fmt: skip
    assert facts["code"] == {}
    assert facts["numbers"]["loss"] == [2.0, 3.0]
    assert "perplexity" not in facts["numbers"]
    assert "+50.0 %" in facts["said"]
    assert "code: the same" in facts["said"]


def test_reading_leaves_no_folder(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command(capsys, "runs")["runs"] == []
    assert cli.main(["show", "1"]) == ExitCode.BAD_INPUT
    assert cli.main(["gc"]) == ExitCode.DONE
    assert list(home.iterdir()) == []


def test_a_full_disk_does_not_hide_what_failed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    failed = run()

    def full(path: Path, text: str) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ledger.durable, "write_text", full)
    failing(failed, InputError("what failed first"))
    assert "the record of this run is not complete: [Errno 28]" in caplog.text
    monkeypatch.undo()
    with ledger.alone() as nobody:
        assert nobody, "it holds nothing any more"
