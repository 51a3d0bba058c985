"""Prefect's environment: settled before Prefect reads it, overruled by the caller's, right for server and worker."""

import json
import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from magellano.errors import InputError
from tasks import settings

ROOT = Path(__file__).parent.parent.parent


def environment_after_import(tmp_path: Path, **given: str) -> dict[str, str]:
    code = "import tasks, os, json, sys; print(json.dumps([dict(os.environ), 'prefect' in sys.modules]))"
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "MAGELLANO_HOME": str(tmp_path / "a" / "home"), **given}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found, prefect_loaded = json.loads(done.stdout)
    assert not prefect_loaded, "too late: Prefect reads its settings when it is imported"
    assert isinstance(found, dict)
    return found


def test_a_plain_process(tmp_path: Path) -> None:
    env = environment_after_import(tmp_path)
    assert env["DO_NOT_TRACK"] == "1"
    assert env["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert env["PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS"] == "180"
    assert env["PREFECT_LOGGING_LEVEL"] == "WARNING"
    assert env["PREFECT_HOME"] == str(tmp_path / "a" / "home" / "prefect")
    assert Path(env["PREFECT_HOME"]).is_dir(), "Prefect would wait three minutes for a folder that it cannot make"


def test_the_address_of_a_server_that_was_killed_is_not_used(tmp_path: Path) -> None:
    """`magellano down` would have removed it."""
    stale = tmp_path / ".magellano" / "site"
    stale.mkdir(parents=True)
    shutil.copy(ROOT / "prefect.toml", tmp_path)
    dead = "http://127.0.0.1:1/api"
    (stale / "profiles.toml").write_text(f'active = "x"\n[profiles.x]\nPREFECT_API_URL = "{dead}"\n')
    code = "from prefect.settings import get_current_settings as s; print(s().api.url)"
    env = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    said = [
        subprocess.run(
            [sys.executable, "-c", first + code], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
        ).stdout.strip()
        for first in ("", "import tasks; ")
    ]
    assert said == [dead, "None"]


def test_a_server_of_the_caller_is_used(tmp_path: Path) -> None:
    env = environment_after_import(tmp_path, PREFECT_API_URL="http://127.0.0.1:1/api")
    assert env["PREFECT_API_URL"] == "http://127.0.0.1:1/api"
    assert "PREFECT_HOME" not in env


def test_the_caller_s_settings_win(tmp_path: Path) -> None:
    env = environment_after_import(tmp_path, PREFECT_LOGGING_LEVEL="DEBUG", PREFECT_HOME=str(tmp_path / "mine"))
    assert (env["PREFECT_LOGGING_LEVEL"], env["PREFECT_HOME"]) == ("DEBUG", str(tmp_path / "mine"))


def test_a_worker_s_run_logs_everything(tmp_path: Path) -> None:
    assert "PREFECT_LOGGING_LEVEL" not in environment_after_import(tmp_path, PREFECT__FLOW_RUN_ID="x")


def test_prefect_knows_every_setting() -> None:
    """A misspelt key in prefect.toml would be ignored in silence."""
    code = (
        "import json; from prefect.settings import get_current_settings;"
        "print(json.dumps(list(get_current_settings().to_environment_variables())))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    )
    named = {name for name in settings.environment() if name.startswith("PREFECT_")}
    assert named
    assert named <= set(json.loads(done.stdout))


@pytest.mark.parametrize(("error", "kept"), [(InputError("one line"), False), (KeyError("a bug"), True)])
def test_expected_failures_lose_their_traceback(error: Exception, kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", "x")
    record = logging.LogRecord("x", logging.ERROR, "x", 1, "failed: %r", (error,), (type(error), error, None))
    for filter_ in logging.getLogger("prefect.task_runs").filters:
        assert filter_(record) if callable(filter_) else filter_.filter(record)
    assert bool(record.exc_info) == kept
    assert record.getMessage() == (f"failed: {error!r}" if kept else "one line")


@pytest.mark.parametrize(("error", "logged"), [(InputError("one line"), False), (KeyError("a bug"), True)])
def test_in_a_plain_process_the_caller_tells_expected_failures(error: Exception, logged: bool) -> None:
    record = logging.LogRecord("x", logging.ERROR, "x", 1, "failed: %r", (error,), (type(error), error, None))
    verdicts = [f(record) if callable(f) else f.filter(record) for f in logging.getLogger("prefect.flow_runs").filters]
    assert verdicts
    assert all(verdicts) == logged
