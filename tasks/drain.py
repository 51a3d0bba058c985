"""`python -m tasks.drain POOL PID`: cancels what the worker below that process runs, and waits until
it is saved.

A worker that ends kills its runs at once, without a signal to them (Prefect 3.8.8): nothing would be saved after the
last checkpoint. A cancelled run gets SIGTERM, finishes its step, saves and ends; `prefect flow-run retry` or the next
run continues from there. The pool is paused meanwhile, so that no worker begins anything.
"""

import sys
import time
from pathlib import Path
from typing import Any
from uuid import UUID

from magellano import artifacts, durable

PATIENCE = 75.0  # seconds; Prefect kills a cancelled run after 30, tasks/restarts.py one without a worker after 60


def main(pool: str, worker: int) -> None:
    """Prints a line for each run."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolUpdate
    from prefect.client.schemas.objects import State, StateType

    with get_client(sync_client=True) as client:
        client.update_work_pool(pool, WorkPoolUpdate(is_paused=True))
        runs = [run for run in _alive(client, pool) if _of_worker(run.id, worker) or _of_this_home(run.id)]
        for run in runs:
            client.set_flow_run_state(run.id, State(type=StateType.CANCELLING, message="magellano down"))
            print(f"cancelled {run.name}: it saves and can be continued")
        left, deadline = {run.id for run in runs}, time.monotonic() + PATIENCE
        while left and time.monotonic() < deadline:
            time.sleep(0.5)
            left &= {run.id for run in _alive(client, pool)}
        if left:
            sys.exit(f"{len(left)} runs did not end in {PATIENCE:.0f} s")


def _alive(client: Any, pool: str) -> list[Any]:
    from prefect.client.schemas import filters as by
    from prefect.client.schemas.objects import StateType

    alive = by.FlowRunFilterStateType(any_=[StateType.RUNNING, StateType.PENDING, StateType.CANCELLING])
    mine = by.WorkPoolFilter(name=by.WorkPoolFilterName(any_=[pool]))
    found: list[Any] = client.read_flow_runs(
        flow_run_filter=by.FlowRunFilter(state=by.FlowRunFilterState(type=alive)), work_pool_filter=mine
    )
    return found


def _of_this_home(run: UUID) -> bool:
    """Whether it lives in a process of this home, which may have lost its worker."""
    return durable.held(artifacts.home() / "runs" / f"{run}.json")


def _of_worker(run: UUID, worker: int) -> bool:
    """Whether a process of that run descends from the worker; where /proc is not there (a Mac), one is assumed to."""
    if not Path("/proc/self").exists():
        return True
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"PREFECT__FLOW_RUN_ID={run}".encode() in path.read_bytes() and _descends(int(path.parent.name), worker):
                return True
        except OSError:
            continue
    return False


def _descends(process: int, ancestor: int) -> bool:
    while process > 1:
        if process == ancestor:
            return True
        process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    return False


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
