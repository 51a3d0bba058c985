"""Prefect's own server ends with the process that it serves."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

from prefect.server.api.server import SubprocessASGIServer

from tasks import server

APP = """
async def app(scope, receive, send):
    while scope["type"] == "lifespan":
        kind = (await receive())["type"]
        if kind == "lifespan.startup":
            print("up", flush=True)
        await send({"type": kind + ".complete"})
        if kind == "lifespan.shutdown":
            return
"""


def test_prefect_starts_its_server_by_us() -> None:
    assert SubprocessASGIServer._run_uvicorn_command is server._start


def test_the_server_is_started_as_prefect_would() -> None:
    """Every word of Prefect's command and every variable it sets stands in ours."""
    source = Path(inspect.getsourcefile(SubprocessASGIServer) or "").read_text(encoding="utf-8")
    theirs = source.split("def _run_uvicorn_command")[1].split("def stop")[0]
    ours = (inspect.getsource(server._start) + inspect.getsource(server._popen)).replace("{MODULE}", server.MODULE)
    words = set(re.findall(r'"([^"\s]+)"', theirs)) - {"-m", "uvicorn"}
    assert {"--factory", "PREFECT__SERVER_EPHEMERAL", "--lifespan"} <= words
    assert [word for word in words if f'"{word}"' not in ours and word not in ours] == []


def test_the_server_ends_when_its_owner_does(tmp_path: Path) -> None:
    (tmp_path / "small.py").write_text(APP)
    command = [sys.executable, "-c", server.WATCHED, "--app-dir", str(tmp_path), "small:app", "--port", "0"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdin
    assert process.stdout
    assert process.stdout.readline() == b"up\n"
    assert process.poll() is None
    process.stdin.close()
    process.wait(20)
