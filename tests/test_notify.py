"""The owner's command hears of failures and promotions, and can fail no run."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import pytest

from magellano import notify
from magellano.errors import InputError
from magellano.names import Event, RunState
from magellano.profile import NotifyConfig, load_profile

KEEP = "import os, sys; open(sys.argv[1], 'w').write(sys.stdin.read() + os.environ['MAGELLANO_EVENT'])"


@pytest.fixture(autouse=True)
def _records_reach_caplog(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger("magellano"), "propagate", True)


@pytest.mark.parametrize(
    ("state", "decision", "found"),
    [
        (RunState.FAILED, None, Event.FAILURE),
        (RunState.DONE, "promoted", Event.PROMOTION),
        (RunState.DONE, "kept aside", Event.KEPT_ASIDE),
        (RunState.DONE, "in force already", None),
        (RunState.DONE, None, None),
        (RunState.NOTHING_NEW, None, None),
        (RunState.STOPPED, None, None),
    ],
)
def test_what_there_is_to_tell(state: RunState, decision: str | None, found: Event | None) -> None:
    assert notify.event(state, {"decision": decision} if decision else None) == found


def test_the_command_gets_the_facts_as_json_and_in_its_environment(tmp_path: Path) -> None:
    config = NotifyConfig(command=(sys.executable, "-c", KEEP, str(tmp_path / "a; touch b")))
    notify.tell(config, Event.FAILURE, 7, "demo", "it broke")
    text = (tmp_path / "a; touch b").read_text()
    assert text.endswith("}failure"), "no shell read the name"
    wanted: dict[str, Any] = {"event": "failure", "run": 7, "profile": "demo", "text": "it broke"}
    assert json.loads(text.removesuffix("failure")) == wanted


def test_what_the_owner_does_not_want_to_hear_is_not_told(tmp_path: Path) -> None:
    config = NotifyConfig(command=(sys.executable, "-c", KEEP, str(tmp_path / "told")), on=(Event.PROMOTION,))
    notify.tell(config, Event.FAILURE, 7, "demo", "")
    notify.tell(config, None, 7, "demo", "")
    notify.tell(NotifyConfig(), Event.FAILURE, 7, "demo", "")
    assert not (tmp_path / "told").exists()


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (("no-such-program-here",), "no-such-program-here: "),
        ((sys.executable, "-c", "import sys; sys.exit('the bell is broken')"), "ended with 1: the bell is broken"),
        ((sys.executable, "-c", "import time; time.sleep(60)"), "timed out"),
    ],
)
def test_a_command_that_fails_is_a_warning(
    command: tuple[str, ...], told: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(notify, "PATIENCE", 5.0)
    notify.tell(NotifyConfig(command=command), Event.FAILURE, 7, "demo", "")
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert told in record.getMessage()


def test_the_profile_says_what_to_run() -> None:
    profile = load_profile("demo", {"notify.command": ["say", "done"], "notify.on": ["promotion", "kept_aside"]})
    assert profile.notify.command == ("say", "done")
    assert profile.notify.on == (Event.PROMOTION, Event.KEPT_ASIDE)
    with pytest.raises(InputError, match=r"notify\.on"):
        load_profile("demo", {"notify.on": ["promotoin"]})
