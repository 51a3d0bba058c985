"""Killed or stopped at any moment, inside a save too, a training ends in the bits of one that nothing disturbed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from magellano.backend import on_gpu

ROOT = Path(__file__).resolve().parents[1]
KILLS, STOPS = 6, 3
SCENARIOS: dict[str, dict[str, Any]] = {
    "float32": {"config": {"steps": 12, "accumulate": 2, "checkpoint_every": 3}},
    "float16": {  # its first loss scale overflows: the first steps are skipped
        "config": {
            "steps": 12, "accumulate": 2, "checkpoint_every": 3, "compute": "float16", "state": "float16",
            "evaluate_every": 2,
        },
        "scale": 2.0**27,
    },
    "rollbacks": {"config": {"steps": 14, "checkpoint_every": 3}, "poison": [5, 6, 7, 11, 12, 13]},
}  # fmt: skip

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux" or on_gpu(), reason="forks, and promises bits for CPUs alone"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("resume")
    command = [sys.executable, str(Path(__file__).with_name("resume_runner.py")), str(folder)]
    asked = json.dumps({name: scenario | {"kills": KILLS, "stops": STOPS} for name, scenario in SCENARIOS.items()})
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    outcomes: dict[str, Any] = json.loads(done.stdout)
    return outcomes


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_killed_training_ends_in_the_same_bits(found: dict[str, Any], name: str) -> None:
    whole, killed = found[name]["whole"], found[name]["killed"]
    assert "failed" not in killed
    assert killed["kills"] == KILLS
    assert killed["in_save"] >= KILLS // 2
    assert killed["unsound"] == [], "what stands under a final name is whole"
    assert killed["left"] == []
    for what in ("adapter", "metrics", "rollbacks", "skipped"):
        assert killed[what] == whole[what], what


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_training_that_is_told_to_stop_twice_saves_and_continues(found: dict[str, Any], name: str) -> None:
    whole, stopped = found[name]["whole"], found[name]["stopped"]
    assert stopped["codes"] == [75] * STOPS
    assert stopped["seconds"] < 10.0
    assert stopped["unsound"] == stopped["left"] == []
    for what in ("adapter", "metrics", "rollbacks", "skipped"):
        assert stopped[what] == whole[what], what


def test_the_scenarios_hold_what_they_are_for(found: dict[str, Any]) -> None:
    assert found["float32"]["whole"]["skipped"] == 0
    assert found["float16"]["whole"]["skipped"] > 1
    assert [event["step"] for event in found["rollbacks"]["whole"]["rollbacks"]] == [7, 13]
    assert len({found[name]["whole"]["adapter"] for name in SCENARIOS}) == 3


def test_a_save_that_died_at_any_of_its_operations_leaves_the_one_before_or_itself(found: dict[str, Any]) -> None:
    outcomes = found["every operation"]
    assert len(outcomes) > 15
    assert {case["took"] for case in outcomes} == {2, 3}
    for case in outcomes:
        assert case["unsound"] == []
        assert case["left"] == ["step-000000002", "step-000000003"]
