"""Against a real Prefect server and worker on loopback: deploy, run, read states and artifacts back through the API."""

import json
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.client.schemas.objects import StateType

from magellano.names import Stage
from tests.flows.site import POOL, SHORT, Site, wait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

DEPLOYMENTS = {
    *(f"train/{p}" for p in ("demo", "phase1", "phase2", "phase3", "production3b")),
    "pretrain/demo",
    "pretrain/phase1",
    *(f"stages/{stage}" for stage in Stage),
}
TASKS = {"tokenize", "tokenize for pretrain", "pretrain", "quantize", "attach_lora", "train", "checkpoint", "evaluate"}


def run(site: Site, client: SyncPrefectClient, **parameters: Any) -> UUID:
    """Run train/demo by the command that a user types, to its end; the flow run's id."""
    given = [word for name, value in parameters.items() for word in ("--param", f"{name}={json.dumps(value)}")]
    before = {r.id for r in client.read_flow_runs()}
    site.prefect("deployment", "run", "train/demo", *given)
    (new,) = [r.id for r in client.read_flow_runs() if r.id not in before]

    def final() -> bool:
        state = client.read_flow_run(new).state
        return state is not None and state.is_final()

    wait("the run", final, 180)
    return new


def states(client: SyncPrefectClient, flow_run: UUID) -> dict[str, str]:
    found = client.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[flow_run])))
    return {t.name: t.state.name for t in found if t.state}


def logged(client: SyncPrefectClient, flow_run: UUID, what: str) -> list[str]:
    """The run's log messages once one has `what` in it: a run's last records are stored a moment after its end."""

    def found() -> list[str]:
        of_run = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[flow_run]))
        messages.extend(log.message for log in client.read_logs(of_run, offset=len(messages)))
        return messages if any(what in message for message in messages) else []

    messages: list[str] = []
    return wait(f"{what!r} in the log", found, 30)


def test_deploy_all_stores_every_deployment(client: SyncPrefectClient) -> None:
    flows = {f.id: f.name for f in client.read_flows()}
    assert {f"{flows[d.flow_id]}/{d.name}" for d in client.read_deployments()} == DEPLOYMENTS
    assert {d.work_pool_name for d in client.read_deployments()} == {POOL}
    assert not any(d.global_concurrency_limit for d in client.read_deployments()), (
        "it would kill runs, see prefect.yaml"
    )


def test_a_cron_deployment_gets_its_scheduled_runs(client: SyncPrefectClient) -> None:
    """With SQLAlchemy 2.1 the scheduler inserts no run and says nothing."""
    deployment = client.read_deployment_by_name("train/production3b")
    (schedule,) = deployment.schedules
    assert not schedule.active, "a fresh clone must not train at night unasked"
    client.update_deployment_schedule(deployment.id, schedule.id, active=True)
    scheduled = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])))
    mine = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
    found = wait("scheduled runs", lambda: client.read_flow_runs(flow_run_filter=scheduled, deployment_filter=mine))
    client.update_deployment_schedule(deployment.id, schedule.id, active=False)
    assert {(r.auto_scheduled, r.state.type) for r in found if r.state} == {(True, StateType.SCHEDULED)}
    assert {r.next_scheduled_start_time.minute for r in found if r.next_scheduled_start_time} == {30}


def test_train_demo_runs_shows_itself_and_is_cached_the_second_time(site: Site, client: SyncPrefectClient) -> None:
    site.start("worker", "start", "--pool", POOL, "--limit", "1")
    first = run(site, client, overrides=SHORT)
    flow_run = client.read_flow_run(first)
    assert flow_run.state, site.tail()
    assert flow_run.state.name == "Completed", f"{flow_run.state.message}\n{site.tail()}"
    assert flow_run.name.startswith("train demo 20")
    assert states(client, first) == dict.fromkeys(TASKS, "Completed")

    artifacts = client.read_artifacts(
        artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[first])), limit=200
    )
    kinds = {(a.key, a.type) for a in artifacts}
    assert {(f"{stage}-facts".replace("_", "-"), "table") for stage in Stage} <= kinds
    assert {("train-progress", "progress"), ("pretrain-progress", "progress")} <= kinds
    report = next(str(a.data) for a in artifacts if a.key == "evaluate-report")
    assert "data:image/png;base64," in report
    progress = next(a for a in artifacts if a.key == "train-progress")
    assert float(str(progress.data)) == 100.0
    assert "2/2" in str(progress.description)
    logged(client, first, "quantize     built")
    logged(client, first, "0 of 8 stages were reused, 8 built")

    second = run(site, client, overrides=SHORT)
    assert states(client, second) == dict.fromkeys(TASKS, "Cached")
    logged(client, second, "nothing has changed: all 8 stages were reused, nothing was rebuilt")

    results = [p.read_bytes() for p in (site.folder / "home" / "results").iterdir()]
    assert results
    assert all(isinstance(json.loads(result), dict) for result in results), "results are JSON, never pickle"

    failed = run(site, client, overrides={"train.stepz": 1})
    state = client.read_flow_run(failed).state
    assert state
    assert state.is_failed()
    messages = logged(client, failed, "did you mean 'train.steps'")
    assert not any("Traceback" in message for message in messages), "one line says it"
