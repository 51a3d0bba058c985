"""Readable names for runs: "train demo 2026-11-23 02:30"."""

from pathlib import Path
from typing import Any

from prefect.runtime import flow_run


def run_name() -> str:
    """Flow, stage if it is one, profile, and when the run was due."""
    given: dict[str, Any] = flow_run.parameters
    stage = [str(given["stage"])] if "stage" in given else []
    due = flow_run.scheduled_start_time
    return " ".join([flow_run.flow_name, *stage, Path(str(given.get("profile", "?"))).stem, f"{due:%Y-%m-%d %H:%M}"])
