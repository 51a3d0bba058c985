"""Monitoring never stalls and never fails a stage, whatever Prefect's server does."""

import logging
import time
from collections.abc import Iterator

import pytest

from magellano.names import Stage
from tasks import background, progress
from tasks.progress import StageProgress


@pytest.fixture(autouse=True)
def _records_reach_caplog(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    logger = logging.getLogger("magellano")
    former = logger.propagate, logger.handlers
    logger.propagate, logger.handlers = True, []  # without what a flow in this process has put there
    caplog.set_level(logging.INFO, logger="magellano")
    yield
    logger.propagate, logger.handlers = former


class Server:
    """Stands for Prefect's artifact calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.stored: list[tuple[float, str]] = []
        self.seconds, self.gone = 0.0, False
        monkeypatch.setattr(progress, "create_progress_artifact", self.create)
        monkeypatch.setattr(progress, "update_progress_artifact", self.update)

    def create(self, progress: float, key: str, description: str) -> str:
        self.update(key, progress, description)
        return key

    def update(self, artifact: str, progress: float, description: str) -> None:
        time.sleep(self.seconds)
        if self.gone:
            raise ConnectionError("no server")
        self.stored.append((progress, description))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Server:
    return Server(monkeypatch)


def test_the_last_news_is_always_stored(server: Server) -> None:
    with StageProgress(Stage.ATTACH_LORA) as report:
        for step in range(1, 51):
            report(step, 50, loss=1.0 / step)
    assert server.stored[0][0] == 2.0
    assert server.stored[-1] == (100.0, "50/50  loss 0.0200")
    assert len(server.stored) <= 3, "of what comes faster than it can be shown only the newest is stored"


def test_a_slow_server_does_not_slow_the_loop(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.seconds = 5.0
    monkeypatch.setattr(background, "PATIENCE", 0.2)
    monkeypatch.setattr(progress, "PUBLISH_S", 0.0)
    started = time.monotonic()
    with StageProgress(Stage.TRAIN) as report:
        for step in range(1, 101):
            report(step, 100)
        assert time.monotonic() - started < 1.0
    assert time.monotonic() - started < 2.0, "nor does the end of the stage wait for long"


def test_a_server_that_is_gone_is_told_of_once(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    server.gone = True
    with StageProgress(Stage.TRAIN) as report:
        report(1, 2)
        report(2, 2)
    assert [r.levelname for r in caplog.records if "not shown in Prefect's UI: no server" in r.message] == ["WARNING"]


def test_a_stage_that_says_nothing_shows_nothing(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    with StageProgress(Stage.TRAIN):
        pass
    assert server.stored == []
    assert capsys.readouterr().err == ""


def test_lines_for_a_person_and_for_a_run_s_log(
    server: Server,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with StageProgress(Stage.TRAIN) as report:
        report(2, 2, loss=0.5)
    assert "train: 2/2  loss 0.5000" in capsys.readouterr().err
    assert caplog.messages == []

    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "x")
    with StageProgress(Stage.TRAIN) as report:
        report(1, 2, loss=0.7)
        report(2, 2, loss=0.5)
    assert capsys.readouterr().err == ""
    assert caplog.messages == ["train: 2/2  loss 0.5000"]


def test_an_attempt_is_bounded_and_only_warns(caplog: pytest.LogCaptureFixture) -> None:
    assert background.attempt("fine", lambda: None)
    assert caplog.messages == []

    started = time.monotonic()
    assert not background.attempt("slow", lambda: time.sleep(5), patience=0.1)
    assert time.monotonic() - started < 1.0
    assert "slow: Prefect's server did not answer within 0.1 s" in caplog.text

    def gone() -> None:
        raise ConnectionError("no server")

    assert not background.attempt("gone", gone)
    assert "gone: not stored by Prefect's server (no server)" in caplog.text
