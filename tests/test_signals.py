"""Signals that come again: while a stop is under way, after it, and while the interpreter ends, they change nothing."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from magellano import signals

ROOT = Path(__file__).parent.parent
STOPS = """
import atexit, signal, sys, time
from magellano import signals
atexit.register(time.sleep, 0.5)  # as Prefect's server takes its time to end
with signals.StopRequest() as stop:
    print("ready", flush=True)
    while not stop.requested:
        time.sleep(0.01)
time.sleep(0.2)
signals.hold_off()
time.sleep(0.1)
sys.exit(75)
"""


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_signals_that_come_again_do_not_change_the_exit_code(sent: signal.Signals) -> None:
    process = subprocess.Popen([sys.executable, "-c", STOPS], stdout=subprocess.PIPE, cwd=ROOT)
    assert process.stdout
    assert process.stdout.readline() == b"ready\n"
    count = 0
    while process.poll() is None and count < 2000:
        process.send_signal(sent)
        count += 1
        time.sleep(0.01)
    assert process.wait(10) == 75
    assert count > 30, "it was sent until the end"


def test_without_a_request_the_former_handler_is_back_at_once() -> None:
    seen: list[int] = []
    former = signal.signal(signal.SIGTERM, lambda number, frame: seen.append(number))
    try:
        with signals.StopRequest():
            pass
        signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, former)


def test_after_the_grace_the_former_handler_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "GRACE", 0.2)
    seen: list[int] = []

    def mine(number: int, frame: object) -> None:
        seen.append(number)

    former = signal.signal(signal.SIGTERM, mine)
    try:
        with signals.StopRequest() as stop:
            signal.raise_signal(signal.SIGTERM)
        assert stop.requested
        signal.raise_signal(signal.SIGTERM)
        assert seen == []
        time.sleep(0.25)
        signal.raise_signal(signal.SIGTERM)
        assert seen == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, former)
