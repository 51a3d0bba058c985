"""Runs that died, and nights that were missed. Our manifests are the truth about what is done; this brings Prefect's
books in line when a run starts.

A run holds (flock) `$MAGELLANO_HOME/runs/<flow run>.json` as long as its process lives. A file that nobody holds is
that of a dead process: a flow run of it that Prefect still believes to be running is marked Crashed. A worker would do
that at once, but not where it died too: killed together with the run, or the power gone. Where `magellano up` runs, it
is then started again (tasks/restarts.py).
"""

import fcntl
import json
import logging
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelled, Crashed
from prefect.types._datetime import now

from magellano import artifacts, durable, files, turns
from magellano.errors import InputError
from tasks import background, settings, terminal

log = logging.getLogger("magellano.tasks")

ALIVE = {StateType.RUNNING, StateType.CANCELLING}
FRESH = timedelta(hours=1)  # a run that crashed longer ago is not started again
_held: list[int] = []  # this process's descriptor: closing it, or dying, frees the file


def announce() -> None:
    """Say that the current flow run lives in this process, then settle what died and what was missed before it."""
    turns.give()
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return
    run = context.flow_run
    if settings.in_worker():
        terminal.outlive_the_reader(artifacts.home() / "site" / "worker.log")
    folder = artifacts.private_folder(artifacts.home() / "runs")
    while _held:
        os.close(_held.pop())
    _held.append(_hold(folder / f"{run.id}.json", run))

    def settle() -> None:
        with get_client(sync_client=True) as client:
            settle_dead_runs(client, folder)
            _cancel_missed_runs(client, run)

    background.attempt("settling earlier runs", settle)


def _hold(path: Path, run: FlowRun) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        if path.exists() and os.fstat(fd).st_ino == path.stat().st_ino:
            break
        os.close(fd)  # removed meanwhile by a run that settled it
    facts = {
        "flow_run": str(run.id),
        "attempt": run.run_count,
        "pid": os.getpid(),
        "machine": _machine(),
        "server": _server(),
    }
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps(facts).encode(), 0)
    return fd


def settle_dead_runs(
    client: SyncPrefectClient, folder: Path, crashed: Callable[[SyncPrefectClient, FlowRun], bool] | None = None
) -> None:
    """Mark this machine's runs that died as Crashed, those that were being cancelled as Cancelled, with their tasks.

    `crashed` is then given each run of a deployment that has crashed within FRESH, and says whether that is all.
    """
    for path in sorted(folder.glob("*.json")):
        try:
            fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _settled(client, path, crashed):
                path.unlink(missing_ok=True)
        except BlockingIOError:  # it lives
            continue
        finally:
            os.close(fd)


def living(folder: Path) -> list[tuple[UUID, int]]:
    """Flow run and process of each run of this machine that lives."""
    found = []
    for path in sorted(folder.glob("*.json")):
        facts = _read(path) if durable.held(path) else None
        if facts and facts["machine"] == _machine() and isinstance(facts["pid"], int):
            found.append((UUID(facts["flow_run"]), facts["pid"]))
    return found


def _settled(
    client: SyncPrefectClient, path: Path, crashed: Callable[[SyncPrefectClient, FlowRun], bool] | None
) -> bool:
    """Whether nothing is left to do about the dead process of this file."""
    facts = _read(path)
    if facts is None:
        return True
    if facts["machine"] != _machine():
        return False
    try:
        run = client.read_flow_run(UUID(facts["flow_run"]))
    except ObjectNotFound:
        return bool(facts["server"] == _server())  # else that of another server, which may come back
    if run.run_count != facts["attempt"] or run.state is None:
        return False  # another process has taken it up and is about to say so
    if run.state.type in ALIVE:
        run.state = mark(client, run)
    if run.deployment_id is None:
        return True
    if not run.state.is_crashed():
        return run.state.is_final()  # else it was put back into the queue
    return now("UTC") - run.state.timestamp > FRESH or (crashed is not None and crashed(client, run))


def mark(client: SyncPrefectClient, run: FlowRun) -> State[Any]:
    """Enter that the run's process is gone."""
    assert run.state
    if run.state.is_cancelling():
        ended: State[Any] = Cancelled(message="its process ended while it was being cancelled")
    else:
        ended = Crashed(message="its process is gone; what it finished is kept, the next run continues")
    of_run = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
    for task in client.read_task_runs(flow_run_filter=of_run):
        if task.state is not None and task.state.type in ALIVE | {StateType.PENDING}:
            client.set_task_run_state(task.id, ended, force=True)
    client.set_flow_run_state(run.id, ended, force=True)
    log.warning("run %s died without saying so: marked as %s; what it finished is kept", run.name, ended.type.lower())
    return ended


def _cancel_missed_runs(client: SyncPrefectClient, run: FlowRun) -> None:
    """Of several scheduled runs that were missed one catches up: `run`, where it is one of them. The rest is cancelled,
    but for runs with other parameters.
    """
    if not run.auto_scheduled or run.deployment_id is None:
        return
    due = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
        expected_start_time=FlowRunFilterExpectedStartTime(before_=now("UTC")),
    )
    mine = DeploymentFilter(id=DeploymentFilterId(any_=[run.deployment_id]))
    for missed in client.read_flow_runs(flow_run_filter=due, deployment_filter=mine):
        ours = (
            missed.auto_scheduled and missed.id != run.id and not missed.run_count
        )  # else started again after a crash
        if ours and missed.parameters == run.parameters:
            client.set_flow_run_state(missed.id, Cancelled(message=f"missed; {run.name} catches up for it"), force=True)
            log.info("the missed run of %s is cancelled: this one catches up for it", missed.expected_start_time)


def _read(path: Path) -> dict[str, Any] | None:
    """What `_hold` wrote; None, with a warning, for anything else."""
    try:
        facts = files.read_json(path, "it is removed")
        UUID(str(facts["flow_run"]))
        known = {name: facts[name] for name in ("flow_run", "attempt", "machine", "server")}
        return known | {"pid": facts.get("pid")}  # older records have none
    except (InputError, KeyError, ValueError) as e:
        log.warning("%s: not the record of a run (%s); removing it", path, files.told(e))
        return None


def _machine() -> str:
    return socket.gethostname().split(".")[0].lower()  # what follows the dot changes with the network on a Mac


def _server() -> str:
    return os.environ.get("PREFECT_API_URL", "")
