"""The server that Prefect starts for a process without PREFECT_API_URL ends with that process, however it ends.

Prefect stops it at a clean exit alone: after a SIGKILL it would run on for good, one more each time. Here it gets a
pipe that breaks with its owner. Prefect's start is repeated with a few words changed; its version is pinned.
"""

import importlib.abc
import importlib.machinery
import os
import subprocess
import sys
from types import ModuleType
from typing import Any

LOG = "server.log"  # of the last start, beside its database: a screen of SQL on a full disk hid our one line
MODULE = "prefect.server.api.server"
WATCHED = """
import os, signal, sys, threading, time
def watch():
    sys.stdin.buffer.read()  # ends when the owner does
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
    os._exit(1)
threading.Thread(target=watch, daemon=True).start()
from uvicorn.main import main
main()
"""


def end_with_us() -> None:
    """Call before Prefect starts its server; imports nothing of it."""
    if MODULE in sys.modules:
        _change(sys.modules[MODULE])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Changes the module when it is imported: importing it here would cost a second where no server is started."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        assert spec
        assert spec.loader
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _change(module: ModuleType) -> None:
    module.SubprocessASGIServer._run_uvicorn_command = _start


def _start(self: Any) -> subprocess.Popen[Any]:
    import prefect
    from prefect.settings import get_current_settings

    settings = get_current_settings().to_environment_variables(exclude_unset=True)
    log = os.open(get_current_settings().home / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
    own = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
    try:
        return _popen(self.port, {**os.environ, **own, **settings}, str(prefect.__module_path__.parent), log)
    finally:
        os.close(log)


def _popen(port: int, environment: dict[str, str], folder: str, log: int) -> subprocess.Popen[Any]:
    return subprocess.Popen(
        [
            sys.executable, "-c", WATCHED, "--app-dir", folder,
            "--factory", f"{MODULE}:create_app", "--host", "127.0.0.1", "--port", str(port),
            "--log-level", "error", "--lifespan", "on",
        ],
        env=environment, stdin=subprocess.PIPE, stdout=log, stderr=log,
    )  # fmt: skip
