"""Against a real Prefect server and worker on loopback: deploy, run, read states and artifacts back through the API."""

import json
from datetime import timedelta
from typing import Any
from uuid import UUID
from zoneinfo import ZoneInfo

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
from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule

from magellano import ledger
from magellano.names import Stage
from tests.flows.site import POOL, SHORT, Site, wait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ROME = ZoneInfo("Europe/Rome")
DEPLOYMENTS = {
    *(f"train/{p}" for p in ("demo", "phase1", "phase2", "phase3", "production3b")),
    "pretrain/demo",
    "pretrain/phase1",
    *(f"stages/{stage}" for stage in Stage),
    "nightly/demo",
    "nightly/production3b",
}
NIGHT = {**SHORT, "gate.min_gain_on_base_percent": -50.0}  # two steps teach nothing
TASKS = {"tokenize", "tokenize for pretrain", "pretrain", "quantize", "attach_lora", "train", "checkpoint", "evaluate"}


def records(site: Site) -> list[ledger.Record]:
    """The runs that the site's home knows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAGELLANO_HOME", site.env["MAGELLANO_HOME"])
        return ledger.records()


def run(site: Site, client: SyncPrefectClient, deployment: str = "train/demo", **parameters: Any) -> UUID:
    """Run a deployment by the command that a user types, to its end; the flow run's id."""
    given = [word for name, value in parameters.items() for word in ("--param", f"{name}={json.dumps(value)}")]
    before = {r.id for r in client.read_flow_runs()}
    site.prefect("deployment", "run", deployment, *given)
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
    deployment = client.read_deployment_by_name("nightly/production3b")
    (schedule,) = deployment.schedules
    assert not schedule.active, "a fresh clone must not train at night unasked"
    assert isinstance(schedule.schedule, CronSchedule)
    assert schedule.schedule.timezone == "Europe/Rome"
    client.update_deployment_schedule(deployment.id, schedule.id, active=True)
    scheduled = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])))
    mine = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))
    found = wait("scheduled runs", lambda: client.read_flow_runs(flow_run_filter=scheduled, deployment_filter=mine))
    client.update_deployment_schedule(deployment.id, schedule.id, active=False)
    assert {(r.auto_scheduled, r.state.type) for r in found if r.state} == {(True, StateType.SCHEDULED)}
    due = [r.next_scheduled_start_time for r in found if r.next_scheduled_start_time]
    assert {(t.astimezone(ROME).hour, t.astimezone(ROME).minute) for t in due} == {(2, 30)}, "in summer and in winter"
    wanted = {"profile": "production3b", "jitter_minutes": 20}
    assert [r.parameters for r in found] == [wanted] * len(found)


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
    page = next(str(a.data) for a in artifacts if a.key == "run-report")
    assert page.count("data:image/png;base64,") == 2
    assert "run 1 took" in page
    assert "| checkpoint | " in page.split("What was made from what")[1]
    logged(client, first, "quantize     built")
    logged(client, first, "0 of 8 stages were reused, 8 built")

    second = run(site, client, overrides=SHORT)
    assert states(client, second) == dict.fromkeys(TASKS, "Cached")
    logged(client, second, "nothing has changed: all 8 stages were reused, nothing was rebuilt")

    again = run(site, client, overrides=SHORT, rerun=["checkpoint"])
    rebuilt = {"checkpoint", "evaluate"}
    assert states(client, again) == {name: "Completed" if name in rebuilt else "Cached" for name in TASKS}
    number = next(r.number for r in records(site) if r.flow_run == str(first))
    alone = run(site, client, "stages/checkpoint", run=number, rerun=True)
    expected = dict.fromkeys(TASKS - {"evaluate"}, "Cached") | {"checkpoint": "Completed"}
    assert states(client, alone) == expected

    results = [p.read_bytes() for p in (site.folder / "home" / "results").iterdir()]
    assert results
    assert all(isinstance(json.loads(result), dict) for result in results), "results are JSON, never pickle"

    failed = run(site, client, overrides={"train.stepz": 1})
    state = client.read_flow_run(failed).state
    assert state
    assert state.is_failed()
    messages = logged(client, failed, "did you mean 'train.steps'")
    assert not any("Traceback" in message for message in messages), "one line says it"


def test_a_night_shows_its_decision_and_the_next_that_nothing_is_new(site: Site, client: SyncPrefectClient) -> None:
    if not any(r.flow == "train" for r in records(site)):
        site.start("worker", "start", "--pool", POOL, "--limit", "1")
    overrides = NIGHT
    first = client.read_flow_run(run(site, client, "nightly/demo", overrides=overrides)).state
    assert first
    assert (first.type, first.name) == (StateType.COMPLETED, "Promoted"), f"{first.message}\n{site.tail()}"
    record = records(site)[-1]
    assert record.gate
    assert record.gate["decision"] == "promoted"
    night = client.read_flow_run(run(site, client, "nightly/demo", overrides=overrides))
    assert night.state
    assert (night.state.type, night.state.name) == (StateType.COMPLETED, "Nothing new"), night.state.message
    assert f"since run {record.number}" in str(night.state.message)
    assert states(client, night.id) == {}, "no stage was looked at"
    messages = logged(client, night.id, "no training: nothing new")
    assert any("nothing new since run" in message for message in messages)


def test_a_scheduled_night_fires_and_waits_its_share(site: Site, client: SyncPrefectClient) -> None:
    deployment = client.read_deployment_by_name("nightly/demo")
    given = {"overrides": NIGHT, "jitter_minutes": 0.02}
    often = [(IntervalSchedule(interval=timedelta(seconds=20)), True)]
    (schedule,) = client.create_deployment_schedules(deployment.id, often, parameters=given)
    mine = DeploymentFilter(id=DeploymentFilterId(any_=[deployment.id]))

    def fired() -> list[UUID]:
        runs = client.read_flow_runs(deployment_filter=mine)
        return [r.id for r in runs if r.auto_scheduled and r.state and r.state.is_final()]

    try:
        (first, *_) = wait("a scheduled run", fired, 180)
    finally:
        client.delete_deployment_schedule(deployment.id, schedule.id)
    run_ = client.read_flow_run(first)
    assert run_.state
    assert run_.state.name in ("Nothing new", "Promoted"), f"{run_.state.message}\n{site.tail()}"
    messages = logged(client, first, "a share of jitter_minutes")
    assert any("starting in 1 s" in m or "starting in 0 s" in m for m in messages)
