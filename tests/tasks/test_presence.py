"""Which runs count as dead; against a real server in tests/flows/test_survival.py."""

import fcntl
import json
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect.exceptions import ObjectNotFound
from prefect.states import Completed, Running, Scheduled

from tasks import presence


class Client:
    """Knows one run; remembers what is set."""

    def __init__(self, state: Any, attempt: int = 1) -> None:
        self.run = SimpleNamespace(
            id=uuid4(), name="train demo", state=state, run_count=attempt, deployment_id=None, tags=[]
        )
        self.set: list[tuple[UUID, str]] = []
        self.tasks = [SimpleNamespace(id=uuid4(), state=s) for s in (Completed(), Running())]

    def read_flow_run(self, run: UUID) -> Any:
        if run != self.run.id:
            raise ObjectNotFound(http_exc=Exception())
        return self.run

    def read_task_runs(self, flow_run_filter: Any) -> Any:
        return self.tasks

    def set_flow_run_state(self, run: UUID, state: Any, force: bool) -> None:
        self.set.append((run, state.name))

    set_task_run_state = set_flow_run_state


def record(folder: Path, run: UUID, **changed: Any) -> Path:
    facts = {"flow_run": str(run), "attempt": 1, "machine": presence._machine(), "server": presence._server()}
    path = folder / f"{run}.json"
    path.write_text(json.dumps(facts | changed))
    return path


def settle(client: Client, folder: Path) -> None:
    presence.settle_dead_runs(client, folder)  # type: ignore[arg-type]


def test_a_dead_process_s_run_is_marked_with_its_task(tmp_path: Path) -> None:
    client = Client(Running())
    path = record(tmp_path, client.run.id)
    settle(client, tmp_path)
    assert client.set == [(client.tasks[1].id, "Crashed"), (client.run.id, "Crashed")]
    assert not path.exists()


@pytest.mark.parametrize("state", [Completed(), Scheduled()])
def test_a_run_that_is_over_or_still_to_come_is_left_as_it_is(tmp_path: Path, state: Any) -> None:
    client = Client(state)
    path = record(tmp_path, client.run.id)
    settle(client, tmp_path)
    assert client.set == []
    assert not path.exists()


def test_a_living_process_s_run_is_left_alone(tmp_path: Path) -> None:
    client = Client(Running())
    path = record(tmp_path, client.run.id)
    held = os.open(path, os.O_RDWR)
    fcntl.flock(held, fcntl.LOCK_EX)
    settle(client, tmp_path)
    assert client.set == []
    os.close(held)
    settle(client, tmp_path)
    assert len(client.set) == 2


@pytest.mark.parametrize("changed", [{"machine": "another"}, {"attempt": 0}])
def test_what_may_be_alive_elsewhere_is_left_alone(tmp_path: Path, changed: dict[str, Any]) -> None:
    client = Client(Running())
    path = record(tmp_path, client.run.id, **changed)
    settle(client, tmp_path)
    assert client.set == []
    assert path.exists()


@pytest.mark.parametrize(("server", "stays"), [("http://127.0.0.1:1/api", True), ("", False)])
def test_a_run_that_this_server_does_not_know(tmp_path: Path, server: str, stays: bool) -> None:
    client = Client(Running())
    path = record(tmp_path, uuid4(), server=server)
    settle(client, tmp_path)
    assert client.set == []
    assert path.exists() is stays, "it may be that of a server that comes back"


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"flow_run": "no id"}', '{"flow_run": 5}'])
def test_a_damaged_record_goes_with_a_warning(tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    settle(Client(Running()), tmp_path)
    assert not path.exists()


def test_a_record_that_was_removed_while_waited_for_is_made_again(tmp_path: Path) -> None:
    run: Any = SimpleNamespace(id=uuid4(), run_count=2)
    path = tmp_path / f"{run.id}.json"
    held = presence._hold(path, run)
    assert json.loads(path.read_text())["attempt"] == 2
    path.unlink()
    os.close(held)
    again = presence._hold(path, run)
    assert os.fstat(again).st_ino == path.stat().st_ino
    os.close(again)
