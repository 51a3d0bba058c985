"""Against a real Prefect server and worker on loopback: deploy, run, read states and artifacts back through the API."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import IO, Any, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo

import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
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
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.workers.process import ProcessWorker

from magellano import ledger
from magellano.names import Stage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

ROOT = Path(__file__).parent.parent.parent
POOL = "gpu"
ROME = ZoneInfo("Europe/Rome")
DEPLOYMENTS = {
    *(f"train/{p}" for p in ("demo", "phase1", "phase2", "phase3", "production3b")),
    "pretrain/demo",
    "pretrain/phase1",
    *(f"stages/{stage}" for stage in Stage),
    "nightly/demo",
    "nightly/production3b",
}
SHORT = {
    "model.d_model": 32, "model.n_layers": 4, "model.d_ff": 32, "data.max_rows": 60, "pretrain.data.max_rows": 40,
    "train.steps": 2, "train.warmup": 1, "train.batch": 2, "evaluate.samples": 1, "evaluate.sample_tokens": 4,
    "evaluate.max_tokens": 256, "pretrain.train.steps": 2, "pretrain.train.warmup": 1, "pretrain.train.batch": 2,
}  # fmt: skip
NIGHT = {**SHORT, "gate.min_gain_on_base_percent": -50.0}  # two steps teach nothing
TASKS = {"tokenize", "tokenize for pretrain", "pretrain", "quantize", "attach_lora", "train", "checkpoint", "evaluate"}

T = TypeVar("T")


def wait(what: str, ask: Callable[[], T | None], seconds: float = 120) -> T:
    """The first answer that is something."""
    deadline = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.5)
    return answer


class Site:
    """A server, the pool, all deployments and a worker, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        self.folder, self.url = folder, f"http://127.0.0.1:{port}/api"
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
        self.env = inherited | {
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_URL": self.url,
            "PREFECT_SERVER_API_PORT": str(port),
            "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",  # the default minute would be waited for
            "MAGELLANO_HOME": str(folder / "home"),
        }
        (folder / "prefect").mkdir()
        self._processes: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []

    def start(self, *arguments: str) -> None:
        log = (self.folder / f"{arguments[0]}.log").open("wb")
        command = [sys.executable, "-m", "prefect", *arguments]
        process = subprocess.Popen(command, cwd=ROOT, env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self._processes.append((process, log))

    def prefect(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    def records(self) -> list[ledger.Record]:
        """The runs that the home knows."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MAGELLANO_HOME", self.env["MAGELLANO_HOME"])
            return ledger.records()

    def stop(self) -> None:
        for process, log in reversed(self._processes):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.close()

    def tail(self) -> str:
        return "\n".join(p.read_text(errors="replace")[-3000:] for p in self.folder.glob("*.log"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    try:
        site.start("server", "start")
        wait("the server", site.healthy)
        yield site
    finally:
        site.stop()


@pytest.fixture(scope="module")
def client(site: Site) -> Iterator[SyncPrefectClient]:
    with temporary_settings({PREFECT_API_URL: site.url}), get_client(sync_client=True) as client:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
        site.prefect("deploy", "--all")
        yield client


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
    number = next(r.number for r in site.records() if r.flow_run == str(first))
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
    if not any(r.flow == "train" for r in site.records()):
        site.start("worker", "start", "--pool", POOL, "--limit", "1")
    overrides = NIGHT
    first = client.read_flow_run(run(site, client, "nightly/demo", overrides=overrides)).state
    assert first
    assert (first.type, first.name) == (StateType.COMPLETED, "Promoted"), f"{first.message}\n{site.tail()}"
    record = site.records()[-1]
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
