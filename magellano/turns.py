"""The first run below a home makes Prefect's database. Runs that start beside it wait for that: where several make it
at once, their servers die. Nothing here knows Prefect.
"""

import fcntl
import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from magellano import durable, site
from magellano.artifacts import home

_held: list[int] = []


def take() -> None:
    """Wait until no other process makes the database; hold the others off where it is not made yet."""
    if _held or os.environ.get("PREFECT_API_URL") or site.running(site.Part.SERVER) or _made().exists():
        return
    fd = os.open(durable.private_folder(home() / "locks") / "database", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    fcntl.flock(fd, fcntl.LOCK_EX)
    if _made().exists():
        os.close(fd)
    else:
        _held.append(fd)


def give() -> None:
    """The database is made: let the others start."""
    if _held:
        _made().touch(mode=0o600)
    while _held:
        os.close(_held.pop())


def _made() -> Path:
    """Marks that this version's database is made."""
    try:
        found = version("prefect")
    except PackageNotFoundError:
        found = "absent"
    return durable.private_folder(home() / "prefect") / f"made-by-{found}"
