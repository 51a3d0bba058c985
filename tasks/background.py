"""Calls to Prefect's server that a stage must never wait for or fail from: a daemon thread makes them.

Measured: a dead server stalls a direct call for 80 s and then fails the training; from here it costs the loop nothing.
"""

import contextvars
import logging
import threading
from collections.abc import Callable

log = logging.getLogger("magellano.tasks")

PATIENCE = 10.0  # seconds that the end of a stage waits for its reports to be stored


def start(work: Callable[[], None]) -> threading.Thread:
    """Run `work` on a daemon thread that knows the current flow and task run."""
    thread = threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True)
    thread.start()
    return thread


def attempt(what: str, call: Callable[[], object], patience: float = PATIENCE) -> bool:
    """Do `call` within `patience` seconds; a failure or a delay is a warning. True where it succeeded."""
    failure: list[Exception] = []

    def work() -> None:
        try:
            call()
        except Exception as e:
            failure.append(e)

    thread = start(work)
    thread.join(patience)
    if thread.is_alive():
        log.warning("%s: Prefect's server did not answer within %g s; the run goes on without it", what, patience)
    elif failure:
        log.warning("%s: not stored by Prefect's server (%s); the run goes on without it", what, failure[0])
    return not thread.is_alive() and not failure
