"""In a plain process the project's loggers print plain lines to standard error; under a worker they feed Prefect."""

import logging
import os
import select
import sys
import threading
from pathlib import Path

from tasks import settings

OUTPUT = (1, 2)


class Lines(logging.Handler):
    """Prints records to the standard error of the moment: a progress bar on it makes room."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        print(prefix + record.getMessage(), file=sys.stderr, flush=True)


def show_logs() -> None:
    """Call as often as you like."""
    logger = logging.getLogger("magellano")
    if not settings.in_worker() and not any(isinstance(h, Lines) for h in logger.handlers):
        logger.addHandler(Lines())
        logger.propagate = False


def outlive_the_reader(log: Path) -> None:
    """Once nobody reads this process's output any more, it goes to the end of `log`, where there is that, or nowhere.

    A run prints into a pipe of its worker. Where the worker was killed, Prefect's next line would end the run: Rich
    takes the broken pipe for a reason to exit.
    """

    def watch() -> None:
        poll = select.poll()
        for fd in OUTPUT:
            poll.register(fd, 0)
        poll.poll()  # returns on an error alone: the reading end was closed
        try:
            there = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW)
        except FileNotFoundError:
            there = os.open(os.devnull, os.O_WRONLY)
        for fd in OUTPUT:
            os.dup2(there, fd)
        os.close(there)

    threading.Thread(target=watch, daemon=True).start()
