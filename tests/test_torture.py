"""Two minutes of `make torture`: a share of the kills, injected faults, damage and contended builds."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from magellano.backend import on_gpu
from tests.torture import network
from tests.torture.outcome import Row, Share, table

ROOT = Path(__file__).parent.parent
linux = pytest.mark.skipif(sys.platform != "linux" or on_gpu(), reason="forks with MLX loaded, strace")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    """What the share finds, in a process of its own: it must fork before anything evaluates an array."""
    command = [sys.executable, "-m", "tests.torture", "--minutes", "1.5", "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("["), done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


@linux
@pytest.mark.slow
def test_nothing_of_the_share_ends_wrong(rows: list[dict[str, Any]]) -> None:
    assert [line for row in rows for line in row["wrong"]] == []
    tried = {row["fault"]: row["tries"] for row in rows if not row["skipped"]}
    assert all(tried.values()), tried
    assert sum(tried.values()) > 1000
    assert {row["skipped"] for row in rows} <= {"", "strace is not there", "may not mount a tmpfs"}


@linux
@pytest.mark.slow
def test_each_stage_and_the_inside_of_a_save_are_struck(rows: list[dict[str, Any]]) -> None:
    notes = {row["fault"]: row["note"] for row in rows}
    assert "train" in notes["SIGKILL in each stage, at random"]
    assert "(save)" in notes["SIGKILL inside a checkpoint's save"]


@pytest.mark.parametrize(
    ("line", "outside"),
    [
        ('7 connect(3, {sa_family=AF_INET, sin_port=htons(443), sin_addr=inet_addr("192.0.2.1")}, 16) = 0', True),
        ('7 connect(3, {sa_family=AF_INET, sin_port=htons(80), sin_addr=inet_addr("127.0.0.1")}, 16) = 0', False),
        ('7 connect(3, {sa_family=AF_INET, sin_port=htons(53), sin_addr=inet_addr("127.0.0.53")}, 16) = 0', True),
        (
            '7 connect(3, {sa_family=AF_INET6, sin6_port=htons(1), inet_pton(AF_INET6, "::1", &sin6_addr)}, 28) = 0',
            False,
        ),
        ('7 connect(3, {sa_family=AF_INET6, inet_pton(AF_INET6, "2001:db8::1", &sin6_addr)}, 28) = -1', True),
        ('7 connect(3, {sa_family=AF_INET6, inet_pton(AF_INET6, "::ffff:127.0.0.1", &sin6_addr)}, 28) = 0', False),
        ('7 sendto(3, ""..., 1, 0, {sa_family=AF_INET, sin_addr=inet_addr("192.0.2.1")}, 16) = 1', True),
        ('7 sendto(3, ""..., 1, 0, NULL, 0) = 1', False),
        ('7 connect(3, {sa_family=AF_UNIX, sun_path="/run/x"}, 110) = 0', False),
        ("7 connect(3, {sa_family=AF_INET, something=odd}, 16) = 0", True),
    ],
)
def test_an_address_beyond_loopback_is_told_from_one_that_is_not(line: str, outside: bool) -> None:
    assert bool(network.beyond(line)) == outside


def test_controls_that_open_a_connection_are_caught() -> None:
    row = network.controls()
    if row.skipped:
        pytest.skip(row.skipped)
    assert row.wrong == []
    assert row.tries == len(network.CONTROLS) + 1


def test_the_table_counts_what_was_wrong() -> None:
    row = Row("a fault", "a level", tries=3)
    assert row.check(True, "never said")
    assert not row.check(None, "seen")
    lines = table([row, Row("another", "level", skipped="no strace")]).splitlines()
    assert lines[2] == "| a fault | a level | 3 | 1 | 0 |  |"
    assert "SKIPPED: no strace" in lines[3]
    assert "| 3 | 1 |" in lines[4]


def test_a_share_of_a_list_keeps_its_ends() -> None:
    assert Share(0.1).spread(list(range(100)), 4) == [0, 11, 22, 33, 44, 55, 66, 77, 88, 99]
    assert Share(1.0).spread([1, 2, 3], 2) == [1, 2, 3]
