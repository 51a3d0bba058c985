"""A real Prefect server and worker on loopback, with all deployments, in a folder of their own."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, TypeVar

ROOT = Path(__file__).parent.parent.parent
POOL = "gpu"
SHORT = {
    "model.d_model": 32, "model.n_layers": 4, "model.d_ff": 32, "data.max_rows": 60, "pretrain.data.max_rows": 40,
    "train.steps": 2, "train.warmup": 1, "train.batch": 2, "evaluate.samples": 1, "evaluate.sample_tokens": 4,
    "evaluate.max_tokens": 256, "pretrain.train.steps": 2, "pretrain.train.warmup": 1, "pretrain.train.batch": 2,
}  # fmt: skip

T = TypeVar("T")


def wait(what: str, ask: Callable[[], T | None], seconds: float = 120) -> T:
    """The first answer that is something."""
    deadline = time.monotonic() + seconds
    while not (answer := ask()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.5)
    return answer


def environment(folder: Path) -> dict[str, str]:
    """The variables of a site below `folder` on a free port, without whatever else says where Prefect is."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    return inherited | {
        "PREFECT_SERVER_API_PORT": str(port),
        "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "5",  # the default minute would be waited for
        "MAGELLANO_HOME": str(folder / "home"),
        "MAGELLANO_LOOK_S": "1",
    }


class Up:
    """What `magellano up` starts, in a home of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.env = folder, environment(folder)
        self.ui = f"http://127.0.0.1:{self.env['PREFECT_SERVER_API_PORT']}"
        self.url = f"{self.ui}/api"
        self.home = folder / "home"

    def magellano(self, *arguments: str, rc: int = 0) -> str:
        """What a command printed; `rc`: how it must end."""
        command = [sys.executable, "-m", "magellano.cli", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=300)
        assert done.returncode == rc, done.stdout + done.stderr
        return done.stdout + done.stderr


class Site:
    """A server, the pool, all deployments and a worker, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder, env = folder, environment(folder)
        self.url = f"http://127.0.0.1:{env['PREFECT_SERVER_API_PORT']}/api"
        self.env = env | {"PREFECT_HOME": str(folder / "prefect"), "PREFECT_API_URL": self.url}
        (folder / "prefect").mkdir()
        self._processes: list[tuple[subprocess.Popen[bytes], IO[bytes]]] = []
        self._named: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, *arguments: str) -> None:
        log = (self.folder / f"{arguments[0]}.log").open("ab")
        command = [sys.executable, "-m", "prefect", *arguments]
        process = subprocess.Popen(command, cwd=ROOT, env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self._processes.append((process, log))
        self._named[arguments[0]] = process

    def kill(self, name: str) -> None:
        """SIGKILL the newest process of this name ("server", "worker")."""
        self._named[name].send_signal(signal.SIGKILL)
        self._named[name].wait()

    def stop_named(self, name: str) -> None:
        """End the newest process of this name as a service manager does, if it runs."""
        if name in self._named and self._named[name].poll() is None:
            self._named[name].terminate()
            self._named[name].wait(120)

    def prefect(self, *arguments: str) -> str:
        command = [sys.executable, "-m", "prefect", "--no-prompt", *arguments]
        done = subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + "/health", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    def stop(self) -> None:
        for process, log in reversed(self._processes):
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.close()

    def tail(self) -> str:
        return "\n".join(p.read_text(errors="replace")[-3000:] for p in self.folder.glob("*.log"))
