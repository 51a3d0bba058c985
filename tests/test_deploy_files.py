"""deploy/: units and the Compose file say what the project needs. What they start is tested in tests/flows."""

import os
import plistlib
import shutil
import subprocess
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return dict(yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8")))


def test_the_team_s_server_is_guarded(compose: dict[str, Any]) -> None:
    server, database = compose["services"]["server"], compose["services"]["database"]
    env = server["environment"]
    assert server["ports"] == ["127.0.0.1:4200:4200"], "on the host's loopback alone"
    assert "ports" not in database
    assert compose["networks"]["inside"]["internal"] is True
    assert env["PREFECT_SERVER_API_CSRF_PROTECTION_ENABLED"] == "true"
    assert env["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert ":?" in env["PREFECT_SERVER_API_AUTH_STRING"], "Compose refuses to start without it"
    assert ":?" in database["environment"]["POSTGRES_PASSWORD"]
    assert env["PREFECT_API_DATABASE_CONNECTION_URL"].startswith("postgresql+asyncpg://")
    assert server["command"] == ["python", "-m", "tasks.serve"]
    assert (ROOT / "tasks" / "serve.py").is_file()


def test_the_image_is_the_version_that_the_project_pins(compose: dict[str, Any]) -> None:
    pinned = (ROOT / "pyproject.toml").read_text(encoding="utf-8").split('"prefect==')[1].split('"')[0]
    assert compose["services"]["server"]["image"].split(":")[1].startswith(f"{pinned}-")


def test_every_variable_of_the_compose_file_is_in_the_example() -> None:
    text = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
    wanted = {part.split("}")[0].split(":?")[0] for part in text.split("${")[1:]}
    given = {line.split("=")[0] for line in (DEPLOY / "team.env.example").read_text().splitlines() if "=" in line}
    assert wanted == given


@pytest.mark.parametrize("part", ["server", "worker"])
def test_units_start_and_stop_the_part(part: str) -> None:
    unit = ConfigParser(strict=True, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(DEPLOY / "systemd" / f"magellano-{part}.service")
    assert unit["Service"]["ExecStart"] == f"CHECKOUT/.venv/bin/magellano up --only {part} --foreground"
    agent = plistlib.loads((DEPLOY / "launchd" / f"org.magellano.{part}.plist").read_bytes())
    assert " ".join(agent["ProgramArguments"]) == unit["Service"]["ExecStart"]
    assert agent["KeepAlive"] == {"SuccessfulExit": False}
    if part == "worker":
        assert unit["Service"]["ExecStop"] == "CHECKOUT/.venv/bin/magellano down --only worker"
        assert int(unit["Service"]["TimeoutStopSec"]) > 45, "longer than a run may take to save"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze: it comes with systemd")
@pytest.mark.parametrize("part", ["server", "worker"])
def test_systemd_understands_the_units(part: str, tmp_path: Path) -> None:
    program = tmp_path / "checkout" / ".venv" / "bin" / "magellano"
    program.parent.mkdir(parents=True)
    program.touch(0o755)
    for name in ("server", "worker"):
        text = (DEPLOY / "systemd" / f"magellano-{name}.service").read_text(encoding="utf-8")
        (tmp_path / f"magellano-{name}.service").write_text(text.replace("CHECKOUT", str(tmp_path / "checkout")))
    command = ["systemd-analyze", "--user", "--man=no", "verify", str(tmp_path / f"magellano-{part}.service")]
    env = os.environ | {"XDG_RUNTIME_DIR": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, ""), "a value that it ignores is a line, no exit code"


def _compose() -> list[str] | None:
    """Compose's command, as a program or as a plugin of docker."""
    if shutil.which("docker-compose"):
        return ["docker-compose"]
    plugin = ["docker", "compose"]
    there = shutil.which("docker") and not subprocess.run([*plugin, "version"], capture_output=True).returncode
    return plugin if there else None


@pytest.mark.skipif(_compose() is None, reason="neither docker-compose nor docker's plugin compose")
def test_compose_understands_its_file_and_refuses_one_without_passwords(tmp_path: Path) -> None:
    env = tmp_path / "team.env"
    example = (DEPLOY / "team.env.example").read_text(encoding="utf-8")
    file = ["--env-file", str(env), "-f", str(DEPLOY / "compose.yaml"), "config"]
    for password, code in (("secret", 0), ("", 1)):
        env.write_text(example.replace("POSTGRES_PASSWORD=", f"POSTGRES_PASSWORD={password}"))
        done = subprocess.run([*(_compose() or []), *file], capture_output=True, text=True, timeout=60)
        assert bool(done.returncode) == bool(code), done.stderr
