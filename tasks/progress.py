"""A stage's progress: for a person at a terminal, in the run's log, and as a progress artifact in Prefect's UI."""

import logging
import threading
import time
from contextlib import ExitStack
from types import TracebackType
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact

from magellano import progress
from magellano.names import Stage
from tasks import background, settings

log = logging.getLogger("magellano.tasks")

LOG_S = 10.0  # seconds between two lines in a run's log
PUBLISH_S = 3.0  # seconds between two updates of the UI


class StageProgress:
    """A magellano.progress.Progress. A call costs microseconds: what may have to wait is done on another thread."""

    def __init__(self, stage: Stage | str) -> None:
        self._stage = stage
        self._person: progress.Progress = self._to_log if settings.in_worker() else progress.silent
        self._leave, self._remaining = ExitStack(), progress.Remaining()
        self._news = threading.Condition()
        self._newest: tuple[float, str] | None = None
        self._closed = False
        self._logged = self._published = time.monotonic()
        self._thread: threading.Thread | None = None

    def __call__(self, done: int, total: int, **facts: float | str) -> None:
        if self._person is progress.silent:  # the bar appears with the first news, so that a reused stage shows none
            self._person = self._leave.enter_context(progress.shown(self._stage))
        facts = self._remaining(done, total) | facts
        self._person(done, total, **facts)
        now = time.monotonic()
        if self._thread is None or done >= total or now - self._published >= PUBLISH_S:
            self._published = now
            self._publish(100 * done / max(total, 1), f"{done}/{total}  {progress.describe(facts)}")

    def __enter__(self) -> "StageProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave.close()
        with self._news:
            self._closed = True
            self._news.notify()
        if self._thread:
            self._thread.join(background.PATIENCE)

    def _to_log(self, done: int, total: int, **facts: float | str) -> None:
        now = time.monotonic()
        if done >= total or now - self._logged >= LOG_S:
            self._logged = now
            log.info("%s: %d/%d  %s", self._stage, done, total, progress.describe(facts))

    def _publish(self, percent: float, text: str) -> None:
        with self._news:
            self._newest = percent, text  # only the newest matters
            self._news.notify()
        self._thread = self._thread or background.start(self._publisher)

    def _publisher(self) -> None:
        """Store the newest news until closed; a server that is gone is told of once."""
        artifact: UUID | None = None
        warned = False
        while news := self._next():
            percent, text = news
            try:
                if artifact is None:
                    key = f"{self._stage}-progress".replace("_", "-")
                    artifact = create_progress_artifact(progress=percent, key=key, description=text)  # type: ignore[assignment]
                else:
                    update_progress_artifact(artifact, progress=percent, description=text)
            except Exception as e:
                if not warned:
                    log.warning("%s: progress is not shown in Prefect's UI: %s", self._stage, e)
                warned = True

    def _next(self) -> tuple[float, str] | None:
        """Wait for the newest news; None once closed and all is said."""
        with self._news:
            self._news.wait_for(lambda: self._newest or self._closed)
            news, self._newest = self._newest, None
            return news
