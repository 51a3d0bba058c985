"""`python -m tasks.restarts POOL`: looks after the runs of this machine until it ends; magellano/keeper.py starts it.

A run of a deployment that crashed is put back into its queue, MAGELLANO_RESTARTS times at most, and goes on from its
finished stages and its last checkpoint: its process was killed, or the worker with it, or the power went. That the
process is gone is known from a lock that it held (tasks/presence.py), never guessed from silence. A run that failed,
was cancelled or lives is left alone. The count stands on the run as its tag `restart N of M`.

A run that lost its worker and is cancelled gets SIGTERM from here, for nobody else would tell it. Once a day the pages
of old runs go (tasks/prune.py).
"""

import logging
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
    WorkPoolFilter,
    WorkPoolFilterName,
)
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import ObjectNotFound
from prefect.states import AwaitingRetry, Cancelled, Crashed
from prefect.types._datetime import now

from magellano import artifacts, durable, history, site
from tasks import presence, prune

log = logging.getLogger("magellano.tasks")

TAG = re.compile(r"restart (\d+) of \d+")
DEAF_S, DEAD_S = 20.0, 60.0  # a cancelled run that lives gets SIGTERM, then SIGKILL; of its worker after 2 s and 32 s
LOST_S = 60.0  # that a worker has to start a run's process in
DAY_S = 86400.0
FINAL = "Retry goes on from what is finished"

_told: set[tuple[int, int]] = set()


def main(pool: str) -> None:
    """Look, and wait, for ever. A server that does not answer is told of once."""
    every, trouble, prune_at = site.look_every(), "", time.monotonic()
    while True:
        try:
            with get_client(sync_client=True) as client:
                while True:
                    look(client, pool, site.restarts())
                    if trouble:
                        log.warning("looking after the runs again")
                    trouble = ""
                    if (days := history.keep_days()) and time.monotonic() >= prune_at:
                        prune_at = time.monotonic() + DAY_S
                        if count := prune.prune(client, days, history.KEEP, really=True):
                            log.warning("the pages of %d runs that ended over %g days ago are gone", count, days)
                    time.sleep(every)
        except Exception as e:  # whatever the server answers: the next look may succeed
            if (said := f"{type(e).__name__}: {e}") != trouble:
                log.warning("cannot look after the runs now (%s)", said)
            trouble = said
            time.sleep(every)


def look(client: SyncPrefectClient, pool: str, limit: int) -> None:
    """Settle what died on this machine, start again what crashed, end what was cancelled and was not told."""
    folder = artifacts.private_folder(artifacts.home() / "runs")
    presence.settle_dead_runs(client, folder, lambda client, run: restart(client, run, limit))
    for run in _lost_before_they_began(client, pool, folder):
        presence.mark(client, run)
    for run in _crashed_before_they_began(client, pool):
        restart(client, run, limit)
    for flow_run, process in presence.living(folder):
        _tell(client, flow_run, process)


def restart(client: SyncPrefectClient, run: FlowRun, limit: int) -> bool:
    """Put a crashed run back into its queue, unless that was done `limit` times. Whether nothing is left to do."""
    assert run.state
    told = run.state.message or "no reason is known"
    if _was_cancelled(client, run):
        client.set_flow_run_state(run.id, Cancelled(message=f"cancelled; then: {told}"), force=True)
        return True
    done = next((int(m[1]) for tag in run.tags if (m := TAG.fullmatch(tag))), 0)
    if done >= limit:
        if limit and not told.endswith(FINAL):
            ended: State[Any] = Crashed(message=f"{told}; it was started again {done} times, so not again: {FINAL}")
            client.set_flow_run_state(run.id, ended, force=True)
            log.warning("run %s crashed and was started again %d times: it stays crashed", run.name, done)
        return True
    which = f"restart {done + 1} of {limit}"
    client.update_flow_run(run.id, tags=[*(t for t in run.tags if not TAG.fullmatch(t)), which])
    # Not forced: where somebody was faster (a retry by hand), Prefect refuses.
    client.set_flow_run_state(run.id, AwaitingRetry(message=f"{which}, from what is finished; {told}"))
    log.warning("run %s crashed (%s): %s", run.name, told, which)
    return False


def _was_cancelled(client: SyncPrefectClient, run: FlowRun) -> bool:
    """Whether the attempt that crashed was being cancelled: then its user does not want it back."""
    for state in sorted(client.read_flow_run_states(run.id), key=lambda s: s.timestamp, reverse=True):
        if state.type in (StateType.CANCELLING, StateType.CANCELLED):
            return True
        if state.type is not StateType.CRASHED:
            return False
    return False


def _crashed_before_they_began(client: SyncPrefectClient, pool: str) -> list[FlowRun]:
    """Those whose process ended before it could leave a record, as its worker said."""
    crashed = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.CRASHED])))
    mine = WorkPoolFilter(name=WorkPoolFilterName(any_=[pool]))
    newest = client.read_flow_runs(
        flow_run_filter=crashed, work_pool_filter=mine, sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=20
    )
    return [
        run for run in newest
        if not run.run_count and run.deployment_id and run.state and now("UTC") - run.state.timestamp < presence.FRESH
    ]  # fmt: skip


def _lost_before_they_began(client: SyncPrefectClient, pool: str, folder: Path) -> list[FlowRun]:
    """Those that a worker took up for over LOST_S and that no process of this machine belongs to: the power went while
    they were being started. Only where no other machine has a worker of the pool, and the system tells (/proc).
    """
    pending = FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.PENDING])))
    mine = WorkPoolFilter(name=WorkPoolFilterName(any_=[pool]))
    found = [
        run
        for run in client.read_flow_runs(flow_run_filter=pending, work_pool_filter=mine, limit=20)
        if run.deployment_id and run.state and (now("UTC") - run.state.timestamp).total_seconds() > LOST_S
    ]
    if not found or not Path("/proc/self").exists():
        return []
    if {worker.name for worker in client.read_workers_for_work_pool(pool)} != {site.worker_name(pool)}:
        return []
    alive = _flow_runs_of_processes()
    return [run for run in found if str(run.id) not in alive and not durable.held(folder / f"{run.id}.json")]


def _flow_runs_of_processes() -> set[str]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            variables = path.read_bytes().split(b"\0")
        except OSError:  # another user's, or it ended
            continue
        mark = b"PREFECT__FLOW_RUN_ID="
        found |= {v.removeprefix(mark).decode(errors="replace") for v in variables if v.startswith(mark)}
    return found


def _tell(client: SyncPrefectClient, flow_run: Any, process: int) -> None:
    try:
        run = client.read_flow_run(flow_run)
    except ObjectNotFound:
        return
    if not run.state or not run.state.is_cancelling():
        return
    age = (now("UTC") - run.state.timestamp).total_seconds()
    if age > DEAD_S:
        os.kill(process, signal.SIGKILL)
    elif age > DEAF_S and (process, run.run_count) not in _told:
        log.warning("run %s is cancelled and goes on: telling its process %d", run.name, process)
        _told.add((process, run.run_count))
        os.kill(process, signal.SIGTERM)


if __name__ == "__main__":
    main(sys.argv[1])
