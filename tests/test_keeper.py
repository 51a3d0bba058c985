"""The keeper starts what ends again, and nothing outlives it; with Prefect's worker in tests/flows/test_restarts.py."""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from magellano import keeper, site
from magellano.errors import InputError

KEEP = """
import sys, time
from magellano.keeper import Kept
kept = Kept("sleeper", sys.argv[1])
while True:
    kept.tend()
    time.sleep(0.02)
"""
SLEEPER = """
import os, sys, time
with open(sys.argv[1], "a") as f:
    f.write(f"{os.getpid()}\\n")
time.sleep(60)
"""


def wait(condition: object, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_is_killed_comes_back_and_nothing_outlives_a_killed_keeper(tmp_path: Path) -> None:
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    pids, env = tmp_path / "pids", os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{site.ROOT}"}
    process = subprocess.Popen([sys.executable, "-c", KEEP, str(pids)], env=env, stdout=subprocess.PIPE, text=True)
    try:
        wait(pids.is_file)
        wait(lambda: pids.read_text().endswith("\n"))
        os.kill(int(pids.read_text()), signal.SIGKILL)
        wait(lambda: pids.read_text().count("\n") == 2)
        second = int(pids.read_text().split()[1])
        assert alive(second)
    finally:
        process.kill()
        said = process.communicate()[0]
    assert said == "sleeper ended with -9: starting it again\n"
    wait(lambda: not alive(second))


def test_what_ends_soon_waits_ever_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, started = [100.0], list[float]()

    class Ended:
        def __init__(self, *command: object, **options: object) -> None:
            started.append(clock[0])

        def poll(self) -> int:
            return 1

    monkeypatch.setattr(subprocess, "Popen", Ended)
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    kept = keeper.Kept("prefect")
    for _ in range(200):
        kept.tend()
        clock[0] += 1
    pauses = [after - before for before, after in itertools.pairwise(started)]
    assert pauses[:4] == [3, 5, 9, 17]
    assert set(pauses[4:]) == {31}
    clock[0] += keeper.STEADY_S
    kept.tend()
    assert started[-1] == clock[0], "one that was steady is started at once"


@pytest.mark.parametrize("text", ["", "x", "-1", "0", "1e3", "4000", "nan"])
def test_an_interval_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MAGELLANO_LOOK_S", text)
    with pytest.raises(InputError, match="MAGELLANO_LOOK_S"):
        site.look_every()
    monkeypatch.setenv("MAGELLANO_LOOK_S", "2.5")
    assert site.look_every() == 2.5


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "101"])
def test_a_number_of_restarts_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("MAGELLANO_RESTARTS", text)
    with pytest.raises(InputError, match="MAGELLANO_RESTARTS"):
        site.restarts()
    monkeypatch.setenv("MAGELLANO_RESTARTS", "0")
    assert site.restarts() == 0
