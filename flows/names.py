"""Readable names for runs: "train demo 2026-11-23 02:30"."""

from pathlib import Path
from typing import Any

from prefect.runtime import flow_run


def run_name() -> str:
    """Flow, stage if it is one, profile, and when the run was due."""
    given: dict[str, Any] = flow_run.parameters
    stage = [str(given["stage"])] if "stage" in given else []
    profile = Path(str(given.get("profile") or "?")).stem if not given.get("run") else f"run {given['run']}"
    due = flow_run.scheduled_start_time
    return " ".join([flow_run.flow_name, *stage, profile, f"{due:%Y-%m-%d %H:%M}"])
