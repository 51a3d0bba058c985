"""Prefect's server and worker of this home: where they are, whether they live, starting and stopping them.

    home/site/<part>.json   pid, URL and pool; its process holds (flock) the file as long as it lives
    home/site/<part>.log    what it printed
    home/site/prefect       the server's database
    home/site/profiles.toml its address while it runs, for Prefect's own command line (prefect.toml names the file)

Nothing here knows Prefect: it starts `python -m tasks.<...>` and `python -m magellano.keeper`.
"""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn
from urllib.parse import urlsplit

from magellano import artifacts, durable, files
from magellano.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
PORT = 4200
POOL = "gpu"
PROFILES = "profiles.toml"
LOG_BYTES = 16 << 20  # a longer log begins anew, the former is kept as .log.1
LOOPBACK = {"127.0.0.1", "localhost", "::1"}
LOOK_S, RESTARTS = 10.0, 3
START_S, STOP_S = 240.0, 60.0  # a cold machine of two cores makes the database for a minute


class Part(StrEnum):
    """What belongs to a home."""

    SERVER = "server"
    WORKER = "worker"


def folder() -> Path:
    return durable.private_folder(artifacts.home() / "site")


def running(part: Part) -> dict[str, Any] | None:
    """pid, url and pool of the living process; None where there is none. Makes no folder."""
    path = artifacts.home() / "site" / f"{part}.json"
    return dict(files.read_json(path, f"end the {part} by hand and remove it")) if durable.held(path) else None


def url() -> str:
    """The API that this home uses: that of PREFECT_API_URL, of its running server, or of the one to be started."""
    if given := os.environ.get("PREFECT_API_URL"):
        return given.rstrip("/")
    found = running(Part.SERVER)
    return str(found["url"]) if found else f"http://127.0.0.1:{_port()}/api"


def is_ours(api: str) -> bool:
    """Whether the server at `api` would be one of this machine: else it is used, never started."""
    return urlsplit(api).hostname in LOOPBACK


def healthy(api: str) -> bool:
    """Whether a Prefect server answers there."""
    try:
        with urllib.request.urlopen(api + "/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (OSError, urllib.error.URLError):
        return False


def environment(api: str) -> dict[str, str]:
    """The variables of every process of this home; what the caller set wins, but for what follows from the URL."""
    env = {"DO_NOT_TRACK": "1", "PREFECT_HOME": str(artifacts.home() / "site" / "prefect")} | dict(os.environ)
    if secret := env.get("PREFECT_SERVER_API_AUTH_STRING"):
        env.setdefault("PREFECT_API_AUTH_STRING", secret)
    return env | {"PREFECT_API_URL": api, "MAGELLANO_HOME": str(artifacts.home())}


def server_environment(api: str) -> dict[str, str]:
    """Those of the server, which binds to the URL's host alone and lets no other origin in."""
    parts = urlsplit(api)
    origin = f"{parts.scheme}://{parts.netloc}"
    return environment(api) | {
        "PREFECT_SERVER_API_HOST": "127.0.0.1",
        "PREFECT_SERVER_API_PORT": str(parts.port or PORT),
        "PREFECT_SERVER_UI_API_URL": api,
        "PREFECT_SERVER_API_CORS_ALLOWED_ORIGINS": origin,
    }


def command(part: Part, pool: str) -> list[str]:
    """How a part is started. The worker comes with what looks after its runs, see magellano/keeper.py."""
    return [sys.executable, "-m", *(["tasks.serve"] if part is Part.SERVER else ["magellano.keeper", pool])]


def worker_name(pool: str) -> str:
    """Under which this machine's worker of a pool is known."""
    return f"{socket.gethostname().split('.')[0]}-{pool}"


def look_every() -> float:
    """Seconds between two looks for runs that died: MAGELLANO_LOOK_S. InputError where that is no such number."""
    text = os.environ.get("MAGELLANO_LOOK_S", str(LOOK_S))
    if not text.replace(".", "", 1).isdigit() or not 0 < float(text) <= 3600:
        raise InputError(f"MAGELLANO_LOOK_S={text}: not seconds up to 3600; give a number, or unset it for {LOOK_S:g}")
    return float(text)


def restarts() -> int:
    """How often a run that crashed is started again by itself: MAGELLANO_RESTARTS; 0: never. InputError likewise."""
    text = os.environ.get("MAGELLANO_RESTARTS", str(RESTARTS))
    if not text.isdigit() or int(text) > 100:
        raise InputError(f"MAGELLANO_RESTARTS={text}: not a number up to 100; give one, or unset it for {RESTARTS}")
    return int(text)


def start(part: Part, api: str, pool: str = POOL) -> int:
    """Start a part on its own; its process id. InputError where it runs already."""
    fd = _take(part)
    log = folder() / f"{part}.log"
    if log.exists() and log.stat().st_size > LOG_BYTES:
        log.replace(log.with_suffix(".log.1"))
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW, 0o600)
    try:
        process = subprocess.Popen(
            command(part, pool), cwd=ROOT, env=_environment(part, api), stdin=subprocess.DEVNULL, stdout=out,
            stderr=out, pass_fds=[fd], start_new_session=True,
        )  # fmt: skip
        _enter(fd, process.pid, api, pool)
        return process.pid
    finally:
        os.close(out)
        os.close(fd)  # the process holds its own


def become(part: Part, api: str, pool: str = POOL) -> NoReturn:
    """Go on as that part, for a service manager. InputError where it runs already."""
    fd = _take(part)
    _enter(fd, os.getpid(), api, pool)
    os.set_inheritable(fd, True)
    os.chdir(ROOT)
    os.execve(sys.executable, command(part, pool), _environment(part, api))


def tell_prefect(api: str) -> None:
    """Let `prefect`, typed in the folder that the home is in, use this home's server."""
    text = f'active = "magellano"\n\n[profiles.magellano]\nPREFECT_API_URL = {json.dumps(api)}\n'
    durable.write_text(folder() / PROFILES, text)


def prefect_knows() -> bool:
    """Whether `prefect`, typed in the checkout, uses this home's server."""
    return folder() == ROOT / ".magellano" / "site" and (folder() / PROFILES).exists()


def stop(part: Part) -> bool:
    """End a part by SIGTERM, after STOP_S by SIGKILL. Whether there was one."""
    found = running(part)
    if found is None:
        return False
    os.kill(found["pid"], signal.SIGTERM)
    deadline = time.monotonic() + STOP_S
    while running(part):
        if time.monotonic() > deadline:
            os.kill(found["pid"], signal.SIGKILL)
        time.sleep(0.2)
    if part is Part.SERVER:
        (folder() / PROFILES).unlink(missing_ok=True)
    return True


def wait_healthy(api: str) -> None:
    """Until this home's server answers. InputError where it ended, or does not answer in START_S."""
    deadline = time.monotonic() + START_S
    while not healthy(api):
        if running(Part.SERVER) is None:
            raise InputError(f"the server ended at once; {folder() / 'server.log'} says why")
        if time.monotonic() > deadline:
            raise InputError(f"{api}: no answer in {START_S:.0f} s; {folder() / 'server.log'} says why")
        time.sleep(0.3)


def helper(module: str, api: str, *arguments: str) -> list[str]:
    """What `python -m tasks.<module>` printed. InputError with its last line where it failed."""
    ours = [sys.executable, "-m", f"tasks.{module}", *arguments]
    done = subprocess.run(ours, cwd=ROOT, env=environment(api), capture_output=True, text=True)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()
        raise InputError(f"tasks.{module} failed at {api}: {said[-1]}")
    return done.stdout.splitlines()


def _environment(part: Part, api: str) -> dict[str, str]:
    durable.private_folder(folder() / "prefect")
    return server_environment(api) if part is Part.SERVER else environment(api)


def _take(part: Part) -> int:
    fd = os.open(folder() / f"{part}.json", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return fd
    except BlockingIOError:
        os.close(fd)
        raise InputError(f"{artifacts.home()}: its {part} runs already; magellano down ends it") from None


def _enter(fd: int, pid: int, api: str, pool: str) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, json.dumps({"pid": pid, "url": api, "pool": pool}).encode(), 0)


def _port() -> int:
    text = os.environ.get("PREFECT_SERVER_API_PORT", str(PORT))
    if not text.isdigit():
        raise InputError(f"PREFECT_SERVER_API_PORT={text}: not a port; give a number, or unset it for {PORT}")
    return int(text)
