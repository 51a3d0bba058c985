"""A full disk, told in one line: what is needed, what is free, where."""

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from magellano.errors import DiskFull, InputError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_SPARE = (
    1 << 20
)  # bytes; MLX and safetensors report a failed write without errno: less than this free says why it failed


def require(folder: Path, need: int) -> None:
    """Raise DiskFull where the disk of `folder` has fewer than `need` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < need:
        raise DiskFull(_told(folder, need, free))


@contextmanager
def told_when_full(folder: Path) -> Iterator[None]:
    """Turn a failure for lack of space under `folder`, a folder that may have got its final name meanwhile, into
    DiskFull.
    """
    try:
        yield
    except (DiskFull, InputError):
        raise
    except Exception as e:
        free = shutil.disk_usage(next(p for p in (folder, *folder.parents) if p.exists())).free
        if (isinstance(e, OSError) and e.errno in _FULL) or free < _SPARE:
            written = sum(p.lstat().st_size for p in folder.rglob("*"))
            raise DiskFull(_told(folder, written + _SPARE, free)) from e
        raise


def _told(folder: Path, need: int, free: int) -> str:
    return (
        f"{folder}: the disk is full: at least {need:,} bytes are needed and {free:,} are free; "
        "free some space or set MAGELLANO_HOME to a larger disk"
    )
