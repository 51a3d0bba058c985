"""How long work tells how far it is: a bar on a terminal, a line every few seconds elsewhere, or nothing."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Protocol, TextIO

LINE_INTERVAL = 10.0  # seconds between two lines where there is no terminal


class Progress(Protocol):
    """Called as work goes on: `done` of `total` units and whatever facts are known now (loss, tokens_per_s, ...)."""

    def __call__(self, done: int, total: int, **facts: float | str) -> None: ...


def silent(done: int, total: int, **facts: float | str) -> None:
    """A Progress that says nothing."""


@contextmanager
def shown(title: str, stream: TextIO | None = None) -> Iterator[Progress]:
    """A Progress for a person: rich's bar where `stream` (default: standard error) is a terminal, else plain lines."""
    stream = sys.stderr if stream is None else stream
    if not stream.isatty():
        yield Lines(title, stream)
        return
    from rich.console import Console  # 0.1 s that silent callers need not spend
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[facts]}"),
    )  # fmt: skip
    with Bar(*columns, console=Console(file=stream)) as bar:
        task = bar.add_task(title, total=None, facts="")

        def update(done: int, total: int, **facts: float | str) -> None:
            bar.update(task, completed=done, total=total, facts=describe(facts))

        yield update


class Remaining:
    """How long work still takes at the pace that it had since the first news: a fact for `describe`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._first = clock, (0, 0.0)
        self._begun = False

    def __call__(self, done: int, total: int) -> dict[str, float | str]:
        """{"ETA": ...}; nothing at the first news and at the end."""
        now = self._clock()
        if not self._begun or done < self._first[0]:  # it may be set back to a checkpoint
            self._first, self._begun = (done, now), True
        gone = done - self._first[0]
        if not gone or done >= total:
            return {}
        seconds = round((total - done) * (now - self._first[1]) / gone)
        return {"ETA": str(timedelta(seconds=seconds))}


class Lines:
    """A Progress that prints a line at the start, every `interval` seconds and at the end."""

    def __init__(
        self, title: str, stream: TextIO, interval: float = LINE_INTERVAL, clock: Callable[[], float] = time.monotonic
    ):
        self._title, self._stream, self._interval, self._clock = title, stream, interval, clock
        self._next = clock()
        self._finished = False

    def __call__(self, done: int, total: int, **facts: float | str) -> None:
        now, ends = self._clock(), done >= total
        if (ends and not self._finished) or (not ends and now >= self._next):
            parts = (f"{self._title}: {done}/{total}", describe(facts))
            print("  ".join(part for part in parts if part), file=self._stream, flush=True)
            self._next = now + self._interval
        self._finished = ends


def describe(facts: dict[str, float | str]) -> str:
    """Facts as a person reads them: `loss 3.1416  12,345 tokens/s  peak 1.25 GiB`. Unknown names appear as they are."""
    return "  ".join(_describe(name, value) for name, value in facts.items())


def _describe(name: str, value: float | str) -> str:
    if isinstance(value, str):
        return f"{name} {value}"
    if name == "tokens_per_s":
        return f"{value:,.0f} tokens/s"
    if name.endswith("_gib"):
        return f"{name.removesuffix('_gib')} {value:.2f} GiB"
    return f"{name} {value:,}" if isinstance(value, int) else f"{name} {value:.4f}"
