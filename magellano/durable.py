"""Files that survive: a folder appears under its final name whole and verified, or not at all.

temporary folder beside it -> write -> fsync -> re-read and hash -> seal written last -> rename -> fsync the parent.
`mx.save_safetensors` alone truncates in place and does not fsync: killed in a loop, most of its files were unreadable.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from magellano import files

CHUNK = 1 << 22
TEMPORARY = ".tmp-"
MANIFEST_BYTES = 64 << 20
SELF = "seal"  # in a manifest: SHA-256 of its own text, with zeros in this place
_UNSEALED = "0" * 64
_OLD = f"{TEMPORARY}old-"


def held(path: Path) -> bool:
    """Whether a living process has locked this file or folder (`flock`, which death releases); False if it is not."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who ask must not take each other for a holder
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(fd)


def private_folder(folder: Path) -> Path:
    """`folder`, made where it is missing with its parents, the owner's alone whatever the umask; what was there keeps
    its rights.
    """
    for path in reversed([p for p in (folder, *folder.parents) if not p.exists()]):
        try:
            path.mkdir(mode=0o700)
        except FileExistsError:  # another process made it
            continue
        path.chmod(0o700)
    return folder


def private_files(folder: Path) -> None:
    """Make everything below `folder` the owner's alone: folders 0700, files 0600."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            path.chmod(0o700 if path.is_dir() else 0o600)


def sha256_file(path: Path) -> str:
    """Hex digest of a regular file's bytes. InputError for a link or anything else."""
    with files.opened(path, "put the file itself in its place") as fd, open(fd, "rb", closefd=False) as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Push a file's or folder's data to the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def files_of(folder: Path) -> Iterator[Path]:
    """The files below `folder`, sorted."""
    return (p for p in sorted(folder.rglob("*")) if p.is_file())


def seal(folder: Path, name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """fsync every file, read it back, write `name` = facts + {"files": {path: {bytes, sha256}}, "seal": its own
    SHA-256} last and return it.
    """
    listed = {}
    for path in files_of(folder):
        os.chmod(path, 0o600)
        fsync(path)
        listed[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
    manifest = {**facts, "files": listed, SELF: _UNSEALED}
    text = json.dumps(manifest, indent=2, sort_keys=True) + "\n"
    manifest[SELF] = hashlib.sha256(text.encode()).hexdigest()
    target = folder / name
    target.write_text(text.replace(_own(_UNSEALED), _own(manifest[SELF])), encoding="utf-8")
    os.chmod(target, 0o600)
    fsync(target)
    fsync(folder)
    return manifest


def publish(temporary: Path, final: Path) -> None:
    """Give a sealed folder its final name; what stood there is removed, after it was moved out of the way whole."""
    old = final.with_name(_OLD + final.name)
    if final.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(final, old)
    os.rename(temporary, final)
    fsync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def put_back(parent: Path) -> None:
    """Undo what a `publish` did that died before it gave the new folder its name."""
    for old in parent.glob(f"{_OLD}*"):
        if not (final := parent / old.name.removeprefix(_OLD)).exists():
            old.rename(final)


def damage(folder: Path, name: str, deep: bool = True) -> str | None:
    """Why the sealed `folder` cannot be trusted, or None. `deep` hashes; else sizes alone are compared."""
    try:
        if folder.is_symlink():
            return "it is a symbolic link"
        if not os.path.lexists(folder / name):
            return f"{name} is missing"
        manifest = files.read_json(folder / name, "build it again", MANIFEST_BYTES)
        listed = manifest["files"]
        for relative, facts in listed.items():
            path = folder / relative
            if why := _stray(folder, relative):
                return why
            if not path.is_file():
                return f"{relative} is missing"
            if path.stat().st_size != facts["bytes"]:
                return f"{relative} has {path.stat().st_size} bytes, {facts['bytes']} were written"
            if deep and sha256_file(path) != facts["sha256"]:
                return f"{relative} is not what was written (SHA-256 differs)"
        if not _is_own(folder / name, manifest[SELF]):
            return f"{name} is not what was written (its own SHA-256 differs)"
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        return f"{name} is not readable: {files.told(e)}"
    return None


def _is_own(path: Path, digest: Any) -> bool:
    """Whether `digest`, which stands in the manifest `path`, is that of its text."""
    if not isinstance(digest, str):
        return False
    with files.opened(path, "build it again") as fd:
        text = files.read_at(fd, 0, MANIFEST_BYTES)
    unsealed = text.replace(_own(digest).encode(), _own(_UNSEALED).encode())
    return hashlib.sha256(unsealed).hexdigest() == digest


def _own(digest: str) -> str:
    return f'"{SELF}": "{digest}"'


def _stray(folder: Path, relative: str) -> str | None:
    """Why a name in a manifest is no plain path below `folder`."""
    parts = relative.split("/")
    if any(part in ("", ".", "..") or "\0" in part or len(os.fsencode(part)) > 255 for part in parts):
        return f"{files.shown(relative)} is no path below it"
    for count in range(1, len(parts) + 1):
        if folder.joinpath(*parts[:count]).is_symlink():
            return f"{'/'.join(parts[:count])} is a symbolic link"
    return None


def write_text(path: Path, text: str) -> None:
    """Put `text` under `path` whole: readers, also after a power cut, see what stood there before, or this.

    Of several processes that write it the last one wins. OSError where it does not read back as it was written.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}-{os.getpid()}")
    temporary.unlink(missing_ok=True)  # left by a writer that died
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with open(fd, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(fd)
    if temporary.read_bytes() != text.encode():
        raise OSError(f"{temporary}: does not read back as it was written; check the disk")
    os.replace(temporary, path)
    fsync(path.parent)
