"""Settles Prefect's environment before Prefect is imported: quiet, offline, patient. `tasks/__init__.py` calls it.

With PREFECT_API_URL set, or `magellano up` running, a run talks to that server. Without, Prefect starts one for the
process, on loopback, with its database under $MAGELLANO_HOME/prefect.
"""

import logging
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from magellano import artifacts, site
from magellano.errors import Aborted, DiskFull, InputError, OutOfMemory, Stopped

PREFECT_TOML = Path(__file__).resolve().parent.parent / "prefect.toml"
EXPECTED = (InputError, DiskFull, OutOfMemory, Stopped, Aborted)  # failures that are no bug: their one line says it all


def environment() -> dict[str, str]:
    """The variables that a run without its own settings gets."""
    with PREFECT_TOML.open("rb") as f:
        found = {f"PREFECT_{key}": value for key, value in _flat(tomllib.load(f))}
    found["DO_NOT_TRACK"] = "1"
    del found["PREFECT_PROFILES_PATH"]  # for Prefect's own command line alone
    if not in_worker():
        found["PREFECT_LOGGING_LEVEL"] = "WARNING"  # a terminal shows our lines, not Prefect's bookkeeping
        if not os.environ.get("PREFECT_API_URL"):
            # Not in prefect.toml, whose address nothing here could unset: to Prefect's events an empty one is one too.
            if server := site.running(site.Part.SERVER):
                found["PREFECT_API_URL"] = server["url"]
            found["PREFECT_HOME"] = str(artifacts.home() / "prefect")
            # Not the one of prefect.toml: it outlives a server that was killed.
            found["PREFECT_PROFILES_PATH"] = str(artifacts.home() / "prefect" / "profiles.toml")
    return found


def prepare() -> None:
    """Set what is not set yet, and log failures that are no bug in one line at most."""
    for name, value in environment().items():
        os.environ.setdefault(name, value)
    if "PREFECT_HOME" in os.environ:
        # Prefect makes the last folder alone, and its in-process server waits for three minutes where that fails.
        artifacts.private_folder(Path(os.environ["PREFECT_HOME"]).expanduser())
    logging.getLogger("magellano").setLevel(logging.INFO)
    for name in ("prefect.flow_runs", "prefect.task_runs"):
        logging.getLogger(name).addFilter(_one_line)


def in_worker() -> bool:
    """True in the process that a Prefect worker started for a flow run."""
    return "PREFECT__FLOW_RUN_ID" in os.environ


def watched() -> bool:
    """Whether a server is set that people look at. The database of a process's own would keep half a megabyte of
    pictures a run that nobody sees and nothing removes.
    """
    return bool(os.environ.get("PREFECT_API_URL"))


def results() -> Path:
    """Where Prefect keeps the stages' results: references, as JSON."""
    return artifacts.home() / "results"


def _flat(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}_")
        else:
            yield (prefix + key).upper(), str(value).lower() if isinstance(value, bool) else str(value)


def _one_line(record: logging.LogRecord) -> bool:
    """A logging filter: an expected failure is logged as its one line, without the traceback.

    In a plain process it is not logged at all, nor a final state: who called the flow gets the exception and tells it.
    """
    error = record.exc_info[1] if isinstance(record.exc_info, tuple) else None
    if isinstance(error, EXPECTED):
        record.msg, record.args, record.exc_info = str(error), (), None
        return in_worker()
    return in_worker() or not record.getMessage().startswith("Finished in state")
