"""A folder for somebody else, written whole or not at all: beside its place, then renamed."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from magellano import disk, durable
from magellano.errors import InputError


@contextmanager
def folder(out: Path, need: int = 0) -> Iterator[Path]:
    """An empty private folder, which becomes `out` when the `with` ends well. `need`: bytes that the disk must have.

    InputError where something is in `out` already; DiskFull where the disk is.
    """
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise InputError(f"{out}: there is something already; name an empty folder or a new one")
    final = out.absolute()
    parent = durable.private_folder(final.parent)
    disk.require(parent, need)
    with disk.told_when_full(parent), tempfile.TemporaryDirectory(prefix=durable.TEMPORARY, dir=parent) as temporary:
        own = Path(temporary) / "folder"
        own.mkdir(mode=0o700)
        yield own
        durable.private_files(own)
        for path in durable.files_of(own):
            durable.fsync(path)
        durable.publish(own, final)
