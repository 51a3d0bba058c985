"""Which crashed runs are started again, and which cancelled ones are told; really killed in tests/flows."""

import os
import signal
import subprocess
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.states import AwaitingRetry, Cancelled, Cancelling, Completed, Crashed, Failed, Pending, Running
from prefect.types._datetime import now

from magellano import site
from tasks import presence, restarts
from tests.tasks.test_presence import record


class Client:
    """Knows one run and the states that it was in; remembers what is set."""

    def __init__(self, *states: Any, tags: tuple[str, ...] = (), attempt: int = 1, deployment: UUID | None = None):
        for age, state in enumerate(reversed(states)):
            state.timestamp = now("UTC") - timedelta(seconds=age)
        self.states, self.set, self.tags = list(states), list[str](), list(tags)
        self.workers = [site.worker_name("gpu")]
        self.run = SimpleNamespace(
            id=uuid4(), name="train demo", state=states[-1], run_count=attempt, tags=self.tags,
            deployment_id=deployment or uuid4(),
        )  # fmt: skip

    def read_flow_run(self, run: UUID) -> Any:
        return self.run

    def read_flow_runs(self, flow_run_filter: Any, **more: Any) -> list[Any]:
        return [self.run] if self.run.state.type in flow_run_filter.state.type.any_ else []

    def read_workers_for_work_pool(self, pool: str) -> list[Any]:
        return [SimpleNamespace(name=name) for name in self.workers]

    def read_flow_run_states(self, run: UUID) -> list[Any]:
        return self.states

    def read_task_runs(self, flow_run_filter: Any) -> list[Any]:
        return []

    def set_flow_run_state(self, run: UUID, state: Any, force: bool = False) -> None:
        self.run.state = state
        self.states.append(state)
        self.set.append(f"{state.name}: {state.message}")

    def update_flow_run(self, run: UUID, tags: list[str]) -> None:
        self.run.tags = tags


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAGELLANO_HOME", str(tmp_path))
    (tmp_path / "runs").mkdir(mode=0o700)
    return tmp_path / "runs"


def look(client: Client, limit: int = 3) -> None:
    restarts.look(client, "gpu", limit)  # type: ignore[arg-type]


def test_a_run_that_died_is_started_again_once(folder: Path) -> None:
    client = Client(Running(), tags=("mine",))
    record(folder, client.run.id)
    look(client)
    assert [s.split(":")[0] for s in client.set] == ["Crashed", "AwaitingRetry"]
    assert client.run.tags == ["mine", "restart 1 of 3"]
    look(client)
    client.run.state = Pending()  # a worker takes it; the record is still that of the attempt before
    look(client)
    assert len(client.set) == 2


def test_the_count_goes_up_to_the_limit_and_the_end_says_so_once(folder: Path) -> None:
    client = Client(Crashed(message="died"), tags=("restart 2 of 3",), attempt=3)
    record(folder, client.run.id, attempt=3)
    look(client)
    assert client.run.tags == ["restart 3 of 3"]
    client.run.state = Crashed(message="died")
    for _ in range(3):
        look(client)
    ended = "Crashed: died; it was started again 3 times, so not again: Retry goes on from what is finished"
    assert client.set == ["AwaitingRetry: restart 3 of 3, from what is finished; died", ended]
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("last", [Failed(), Cancelled(), Completed(), AwaitingRetry(), Pending()], ids=lambda s: s.name)
def test_what_did_not_crash_is_left_alone(folder: Path, last: Any) -> None:
    client = Client(Running(), last)
    record(folder, client.run.id)
    look(client)
    assert client.set == []


@pytest.mark.parametrize("states", [(Running(), Cancelling()), (Running(), Cancelling(), Crashed())], ids=len)
def test_what_its_user_cancelled_ends_as_cancelled(folder: Path, states: tuple[Any, ...]) -> None:
    client = Client(*states)
    record(folder, client.run.id)
    look(client)
    assert client.run.state.name == "Cancelled"
    assert client.run.tags == []


def test_one_that_was_cancelled_and_then_retried_by_hand_is_started_again(folder: Path) -> None:
    client = Client(Cancelling(), Cancelled(), AwaitingRetry(), Pending(), Running(), Crashed())
    record(folder, client.run.id)
    look(client)
    assert client.run.state.name == "AwaitingRetry"


def test_none_is_started_again_where_that_is_turned_off_or_it_crashed_long_ago(folder: Path) -> None:
    off, old = Client(Crashed()), Client(Crashed())
    old.run.state.timestamp = now("UTC") - timedelta(hours=2)
    for client, limit in ((off, 0), (old, 3)):
        record(folder, client.run.id)
        look(client, limit)
        assert client.set == []
    assert list(folder.iterdir()) == []


def test_a_living_process_s_run_is_left_alone_whatever_prefect_says(folder: Path) -> None:
    client: Any = Client(Crashed())
    held = presence._hold(folder / f"{client.run.id}.json", client.run)
    look(client)
    assert client.set == []
    os.close(held)
    look(client)
    assert client.run.state.name == "AwaitingRetry"


def test_a_run_that_died_before_it_began_is_started_again(folder: Path) -> None:
    client = Client(Crashed(), attempt=0)
    look(client)
    assert client.run.tags == ["restart 1 of 3"]
    later = Client(Crashed(), attempt=1)  # began: its machine has the record
    look(later)
    assert later.set == []


def test_a_cancelled_run_that_goes_on_is_told_once_and_then_killed(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    client: Any = Client(Running(), Cancelling())
    held = presence._hold(folder / f"{client.run.id}.json", client.run)
    look(client)
    assert sent == [], "its worker comes first"
    for age in (restarts.DEAF_S + 1, restarts.DEAF_S + 2, restarts.DEAD_S + 1):
        client.run.state.timestamp = now("UTC") - timedelta(seconds=age)
        look(client)
    assert sent == [(os.getpid(), signal.SIGTERM), (os.getpid(), signal.SIGKILL)]
    os.close(held)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are told by /proc")
def test_a_run_that_died_while_it_was_started_is_started_again(folder: Path) -> None:
    client = Client(Pending(), attempt=0)
    look(client)
    assert client.set == [], "its worker may be about to start it"
    client.run.state.timestamp = now("UTC") - timedelta(seconds=restarts.LOST_S + 1)
    client.workers.append("another")
    look(client)
    assert client.set == [], "another machine may have it"
    client.workers.pop()
    starting = subprocess.Popen(["sleep", "60"], env={**os.environ, "PREFECT__FLOW_RUN_ID": str(client.run.id)})
    look(client)
    assert client.set == [], "it is being started"
    starting.kill()
    starting.wait()
    look(client)
    assert [s.split(":")[0] for s in client.set] == ["Crashed", "AwaitingRetry"]
    assert client.run.tags == ["restart 1 of 3"]
