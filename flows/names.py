"""Readable names for runs: "train demo 2026-11-23 02:30", "train demo 2026-11-23 #12" once the run has its number."""

from pathlib import Path
from typing import Any

from prefect.client.orchestration import get_client
from prefect.runtime import flow_run

from tasks import background


def run_name() -> str:
    """Flow, stage if it is one, profile, and when the run was due."""
    return _name(f"{flow_run.scheduled_start_time:%Y-%m-%d %H:%M}")


def number(number: int) -> None:
    """Put the run's number into its name, the day kept: `magellano show NUMBER` is then the run that the UI shows."""
    run, name = flow_run.id, _name(f"{flow_run.scheduled_start_time:%Y-%m-%d} #{number}")

    def rename() -> None:
        with get_client(sync_client=True) as client:
            client.update_flow_run(run, name=name)

    background.attempt("the run's name", rename)


def _name(when: str) -> str:
    given: dict[str, Any] = flow_run.parameters
    stage = [str(given["stage"])] if "stage" in given else []
    profile = Path(str(given.get("profile") or "?")).stem if not given.get("run") else f"run {given['run']}"
    return " ".join([flow_run.flow_name, *stage, profile, when])
