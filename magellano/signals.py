"""Stopping on a signal: finish the step, save, then stop."""

import atexit
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
GRACE = 10.0  # seconds in which a process that was asked to stop ends


class StopRequest:
    """While entered, SIGTERM and SIGINT only set `requested`; a second signal changes nothing, nor does one within
    GRACE seconds after. The former handlers return after.

    Signals reach the main thread alone; elsewhere nothing is installed and `requested` stays False.
    """

    def __init__(self) -> None:
        self.requested = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for sig in SIGNALS:
                self._former[sig] = signal.signal(sig, self._on_signal)
                signal.siginterrupt(sig, False)  # MLX takes a read or write that a signal cuts short for a failed one
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sig, handler in self._former.items():
            signal.signal(sig, _later(handler) if self.requested else handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True


def end_process(process: subprocess.Popen[Any], seconds: float) -> None:
    """By SIGTERM, after `seconds` by SIGKILL; waits for it."""
    process.terminate()
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def interrupt_on_term() -> None:
    """From now on SIGTERM is a KeyboardInterrupt, as SIGINT is."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


def hold_off() -> None:
    """From now on SIGTERM and SIGINT change nothing for GRACE seconds, nor once the interpreter ends, which gives them
    their deadly defaults back.
    """
    if threading.current_thread() is threading.main_thread():
        for sig in SIGNALS:
            signal.signal(sig, _later(signal.getsignal(sig)))
            atexit.register(signal.signal, sig, signal.SIG_IGN)


def _later(handler: Any) -> Callable[[int, FrameType | None], None]:
    """What does nothing for GRACE seconds, and then what `handler` does."""
    until = time.monotonic() + GRACE

    def late(number: int, frame: FrameType | None) -> None:
        if time.monotonic() < until:
            return
        signal.signal(number, handler)
        signal.raise_signal(number)

    return late
