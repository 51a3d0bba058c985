"""`python -m tasks.prune DAYS KEEP yes|no`: deletes from Prefect's server what it shows of this home's old runs
(magellano/history.py says which), or only counts them. Where the server is this home's, also scheduled runs that never
began, as missed nights. Prints one JSON object. The database's file keeps its size; its pages are used again.
"""

import json
import os
import sys
from datetime import timedelta
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterId,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound
from prefect.types._datetime import now

from magellano import history, site

BATCH = 100
ENDED = FlowRunFilterStateType(
    any_=[StateType.COMPLETED, StateType.FAILED, StateType.CANCELLED, StateType.CRASHED],
)


def prune(client: SyncPrefectClient, days: float, keep: int, really: bool) -> int:
    """How many runs' pages may go, or `really` went."""
    known, count = history.old(days, keep), 0
    for first in range(0, len(known), BATCH):
        of_home = FlowRunFilterId(any_=[UUID(run) for run in known[first : first + BATCH]])
        there = FlowRunFilter(id=of_home, state=FlowRunFilterState(type=ENDED))
        for run in client.read_flow_runs(flow_run_filter=there, limit=BATCH):
            count += _delete(client, run) if really else 1
    for run in _never_began(client, days) if _is_ours() else []:
        count += _delete(client, run) if really else 1
    return count


def _is_ours() -> bool:
    server = site.running(site.Part.SERVER)
    return server is not None and server["url"] == os.environ.get("PREFECT_API_URL")


def _never_began(client: SyncPrefectClient, days: float) -> list[FlowRun]:
    """Old ones that no process took up: they have no record, and nothing to show."""
    before = FlowRunFilterExpectedStartTime(before_=now("UTC") - timedelta(days=days))
    old = FlowRunFilter(state=FlowRunFilterState(type=ENDED), expected_start_time=before)
    found: list[FlowRun] = []
    while page := client.read_flow_runs(flow_run_filter=old, limit=BATCH, offset=len(found)):
        found += page
    return [run for run in found if not run.run_count]


def _delete(client: SyncPrefectClient, run: FlowRun) -> int:
    """Its artifacts too: Prefect would leave them. 1, or 0 where it has gone meanwhile."""
    of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
    try:
        while artifacts := client.read_artifacts(artifact_filter=of_run, limit=BATCH):
            for artifact in artifacts:
                client.delete_artifact(artifact.id)
        client.delete_flow_run(run.id)
        return 1
    except ObjectNotFound:
        return 0


if __name__ == "__main__":
    with get_client(sync_client=True) as client:
        days, keep, really = float(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "yes"
        print(json.dumps({"runs": prune(client, days, keep, really)}))
