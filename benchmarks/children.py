"""Runs a piece of work in a fresh process and tells its time and peak resident memory; one at a time."""

import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from typing import Any


def in_child(work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """work(*arguments)'s facts with `seconds` and `resident_gb`, of the whole process. RuntimeError if it died."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("spawn").Process(target=_measured, args=(work, arguments, there))
    process.start()
    there.close()
    try:
        facts: dict[str, Any] = here.recv()
    except EOFError:
        process.join()
        raise RuntimeError(f"{work.__name__} ended with exit code {process.exitcode} and no result") from None
    process.join()
    return facts


def _measured(work: Callable[..., dict[str, Any]], arguments: tuple[Any, ...], pipe: Any) -> None:
    started = time.perf_counter()
    facts = work(*arguments)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB here
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
    pipe.send({**facts, "seconds": time.perf_counter() - started, "resident_gb": resident})
