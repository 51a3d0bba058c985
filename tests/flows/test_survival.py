"""Server, worker and run killed: nothing is lost or built twice, the books are put right, missed nights cost one
run.
"""

import json
import os
import signal
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId, FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun

from magellano.names import Stage
from magellano.worker import FAULT
from tests.flows.site import POOL, SHORT, Site, wait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

LONG = SHORT | {"train.steps": 200, "train.checkpoint_every": 5}
BEFORE = {"tokenize", "tokenize for pretrain", "pretrain", "quantize", "attach_lora"}


def manifests(site: Site) -> dict[str, dict[str, Any]]:
    """Every artifact's manifest by its folder."""
    found = (site.folder / "home" / "artifacts").glob("*/[!.]*/manifest.json")
    return {str(p.parent): json.loads(p.read_text()) for p in found}


def training(site: Site, steps: int) -> bool:
    """Whether a training has come so far."""
    metrics = (site.folder / "home" / "work" / Stage.TRAIN).glob("*/step-*")
    return any(int(p.name.removeprefix("step-")) >= steps for p in metrics)


def flow_process(run: UUID) -> int:
    """The process that a worker started for the run."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"PREFECT__FLOW_RUN_ID={run}".encode() in path.read_bytes():
                command = (path.parent / "cmdline").read_bytes()
                if b"magellano.worker" not in command:
                    return int(path.parent.name)
        except OSError:
            continue
    raise AssertionError(f"no process of {run}")


def runs(client: SyncPrefectClient, deployment: UUID) -> list[FlowRun]:
    mine = DeploymentFilter(id=DeploymentFilterId(any_=[deployment]))
    return client.read_flow_runs(deployment_filter=mine, limit=200)


def state(client: SyncPrefectClient, run: UUID) -> str:
    found = client.read_flow_run(run).state
    assert found
    return found.name


def tasks(client: SyncPrefectClient, run: UUID) -> dict[str, str]:
    found = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run])))
    return {t.name: t.state.name for t in found if t.state}


def due(run: FlowRun, when: datetime) -> bool:
    return run.expected_start_time is not None and run.expected_start_time < when


def worker(site: Site) -> None:
    site.start("worker", "start", "--pool", POOL, "--limit", "1")


def server(site: Site) -> None:
    site.start("server", "start")
    wait("the server", site.healthy)


@pytest.fixture
def night(site: Site, client: SyncPrefectClient) -> Iterator[UUID]:
    """A deployment that is due every four seconds."""
    given = {"stage": Stage.TRAIN, "profile": "demo", "overrides": LONG}
    parameters = [word for name, value in given.items() for word in ("--param", f"{name}={json.dumps(value)}")]
    site.prefect("deploy", "flows/stages.py:stages", "--name", "night", "--pool", POOL, "--interval", "4", *parameters)
    found = client.read_deployment_by_name("stages/night").id
    yield found
    client.delete_deployment(found)


def test_what_is_killed_is_made_good(
    site: Site, client: SyncPrefectClient, night: UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(site.env, FAULT, "sleep@*")  # half a second a step: it will not be done before it is killed
    site.stop_named("worker")
    worker(site)

    # The server and the worker are killed: the run lives on. Then it is killed too, and nobody is there to tell.
    first = wait("a run", lambda: [r for r in runs(client, night) if r.state and r.state.name == "Running"], 60)[0]
    wait("its training", lambda: training(site, 5), 90)
    process = flow_process(first.id)
    site.kill("worker")
    site.kill("server")
    server(site)
    wait("the training beyond it", lambda: training(site, 10), 60)
    os.kill(process, signal.SIGKILL)
    wait("two nights more", lambda: sum(due(r, datetime.now(UTC)) for r in runs(client, night)) >= 4, 60)
    before, start = manifests(site), datetime.now(UTC)
    assert state(client, first.id) == "Running", "Prefect believes so"

    # Nights were missed. One run catches up, settles the books and continues the training.
    monkeypatch.delitem(site.env, FAULT)
    worker(site)

    def caught_up() -> list[FlowRun]:
        return [r for r in runs(client, night) if r.id != first.id and r.state and r.state.is_completed()]

    second = wait("the run that catches up", caught_up, 120)[0]
    site.stop_named("worker")
    assert state(client, first.id) == "Crashed"
    found = tasks(client, first.id)
    assert found.pop("train") == "Crashed"
    assert set(found) == BEFORE
    assert set(found.values()) <= {"Completed", "Cached"}, "Cached where other tests on this site built them"
    missed = [r for r in runs(client, night) if r.id not in (first.id, second.id) and due(r, start)]
    assert len(missed) >= 2
    assert {state(client, r.id) for r in missed} == {"Cancelled"}
    assert tasks(client, second.id) == dict.fromkeys(BEFORE, "Cached") | {"train": "Completed"}
    after = manifests(site)
    assert before.items() <= after.items(), "nothing is lost, nothing is built twice"
    (trained,) = (m for m in after.values() if m["stage"] == Stage.TRAIN and m["config"]["train"]["steps"] == 200)
    assert trained["summary"]["resumed_from"] >= 10
