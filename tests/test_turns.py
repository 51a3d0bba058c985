"""One run makes Prefect's database; those beside it wait, the later ones do not."""

import threading
from pathlib import Path

import pytest

from magellano import turns


@pytest.fixture(autouse=True)
def _home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGELLANO_HOME", str(tmp_path))
    monkeypatch.setattr(turns, "_held", [])


def test_the_second_waits_for_the_first_and_nobody_after() -> None:
    turns.take()
    (lock,) = turns._held
    turns._held.clear()  # as if another process held it
    second = threading.Thread(target=turns.take)
    second.start()
    second.join(0.3)
    assert second.is_alive()
    turns._held.append(lock)
    turns.give()
    second.join(10)
    assert not second.is_alive()
    assert turns._held == [], "the second found it made"
    turns.take()
    assert turns._held == []


def test_with_a_server_of_its_own_there_is_nothing_to_make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4200/api")
    turns.take()
    turns.give()
    assert turns._held == []
    assert not list(tmp_path.iterdir())
