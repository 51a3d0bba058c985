"""Stopping on a signal: finish the step, save, then stop."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class StopRequest:
    """While entered, SIGTERM and SIGINT only set `requested`; a second signal changes nothing. The former handlers
    return after.

    Signals reach the main thread alone; elsewhere nothing is installed and `requested` stays False.
    """

    def __init__(self) -> None:
        self.requested = False
        self._former: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for sig in (signal.SIGTERM, signal.SIGINT):
                self._former[sig] = signal.signal(sig, self._on_signal)
                signal.siginterrupt(sig, False)  # MLX takes a read or write that a signal cuts short for a failed one
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for sig, handler in self._former.items():
            signal.signal(sig, handler)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
