"""`python -m magellano.keeper POOL`: the worker of this home and what looks after its runs (tasks/restarts.py), each
started again where it ends, until SIGTERM. `magellano up` starts it. Nothing here knows Prefect.

Neither outlives it: they get a pipe that breaks with this process, however it ends. What a worker runs lives on where
the worker is killed.
"""

import signal
import subprocess
import sys
import time
from types import FrameType

from magellano import signals, site

STEADY_S = 60.0  # who lived so long is started again at once
LONGEST_S = 30.0  # between two starts
GRACE_S = 40.0  # that they have to end in
BOUND = """
import os, runpy, signal, sys, threading
def watch():
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGKILL)  # SIGTERM would have a worker kill what it runs
threading.Thread(target=watch, daemon=True).start()
module = sys.argv.pop(1)
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


class Kept:
    """A process that is started again where it ends: at once, and after ever longer pauses where it ends soon."""

    def __init__(self, *command: str) -> None:
        self.command = command
        self._pause, self._due, self._started = 1.0, 0.0, 0.0
        self._process: subprocess.Popen[bytes] | None = None

    def tend(self) -> None:
        """Start it where it does not run and its pause is over."""
        now = time.monotonic()
        if self._process is not None:
            code = self._process.poll()
            if code is None:
                return
            steady = now - self._started > STEADY_S
            self._pause = 1.0 if steady else min(2 * self._pause, LONGEST_S)
            self._due, self._process = now + (0.0 if steady else self._pause), None
            print(f"{self.command[0]} ended with {code}: starting it again", flush=True)
        if now >= self._due:
            self._started = now
            self._process = subprocess.Popen([sys.executable, "-c", BOUND, *self.command], stdin=subprocess.PIPE)

    def end(self) -> None:
        """By SIGTERM, after GRACE_S by SIGKILL."""
        if self._process is not None and self._process.poll() is None:
            signals.end_process(self._process, GRACE_S)


def main(pool: str) -> None:
    """Until SIGTERM or SIGINT."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(0)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    # One run at a time: a worker's limit dies with it, a pool's would be held by a dead run.
    worker = ["worker", "start", "--pool", pool, "--type", "process", "--limit", "1", "--name", site.worker_name(pool)]
    kept = [Kept("prefect", *worker), Kept("tasks.restarts", pool)]
    try:
        while True:
            for process in kept:
                process.tend()
            time.sleep(0.5)
    finally:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        for process in kept:
            process.end()


if __name__ == "__main__":
    main(sys.argv[1])
