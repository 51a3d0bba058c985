"""In a plain process the project's loggers print plain lines to standard error; under a worker they feed Prefect."""

import logging
import sys

from tasks import settings


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
