"""Opening files that somebody else may have made: regular files alone, never through a link; strict JSON.

A name is looked at before it is opened (a FIFO would block, a device may act) and the opened file once more; whoever
reads it then reads through that descriptor.
"""

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from pydantic import ValidationError

from magellano.errors import InputError

JSON_BYTES = 1 << 20  # of a config; an index of shards may be larger
_SHOWN = 60  # characters of a foreign value that a message repeats
_NOT_ITS_FAULT = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO)
_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@contextmanager
def opened(path: Path, remedy: str) -> Iterator[int]:
    """A descriptor of the regular file `path`, at its start. InputError for anything else; the folder may be a link."""
    try:
        _regular(path, os.lstat(path).st_mode, remedy)
        fd = os.open(path, _FLAGS)
    except (OSError, ValueError) as e:  # ValueError: NUL in a name
        if isinstance(e, InputError) or getattr(e, "errno", None) in _NOT_ITS_FAULT:
            raise
        raise InputError(f"{path}: cannot be opened ({getattr(e, 'strerror', e)}); {remedy}") from None
    try:
        _regular(path, os.fstat(fd).st_mode, remedy)
        yield fd
    finally:
        os.close(fd)


def by_descriptor(fd: int) -> str:
    """A path under which a library opens the very file behind `fd`, whatever has its name meanwhile; from the start."""
    os.lseek(fd, 0, os.SEEK_SET)  # where /dev/fd duplicates a descriptor (macOS) the position is shared
    return f"/dev/fd/{fd}"


def read_json(path: Path, remedy: str, limit: int = JSON_BYTES) -> dict[str, Any]:
    """The JSON object in `path`. InputError where it is larger than `limit` bytes or not strict JSON (see `parse`)."""
    with opened(path, remedy) as fd:
        size = os.fstat(fd).st_size
        if size > limit:
            raise InputError(f"{path}: {size:,} bytes, more than the {limit:,} that such a file may have; {remedy}")
        data = read_at(fd, 0, size)
    try:
        return parse(data)
    except ValueError as e:
        raise InputError(f"{path}: {e}; {remedy}") from None


def read_at(fd: int, start: int, count: int) -> bytes:
    """Up to `count` bytes from `start`, without moving the position."""
    pieces = []
    while count and (piece := os.pread(fd, count, start)):
        pieces.append(piece)
        start, count = start + len(piece), count - len(piece)
    return b"".join(pieces)


def parse(data: bytes) -> dict[str, Any]:
    """A JSON object in UTF-8. ValueError, in one line, for a key that stands twice, NaN, infinite or endless numbers,
    and nesting deeper than the interpreter's stack.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise ValueError(f"not UTF-8 (byte {e.start})") from None
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except ValueError as e:
        raise ValueError(f"not valid JSON: {e}") from None
    if not isinstance(value, dict):
        raise ValueError(f"not a JSON object but {shown(value)}")
    return value


def shown(value: Any) -> str:
    """A foreign value for a message: one line of plain characters, cut short."""
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of {value.bit_length()} bits"
    text = ascii(value if isinstance(value, int | float | None) else value[:_SHOWN] if _sliced(value) else type(value))
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."


def told(error: Exception) -> str:
    """What was wrong with foreign data, in one line: pydantic's findings one after the other, the first four."""
    if not isinstance(error, ValidationError):
        return f"{error} is missing" if isinstance(error, KeyError) else " ".join(str(error).split())
    lines = []
    for e in error.errors(include_url=False)[:4]:
        key = ".".join(str(part)[:_SHOWN] for part in e["loc"])
        got = "" if isinstance(e["input"], dict) else f" (got {shown(e['input'])})"
        lines.append(f"{ascii(key)[1:-1]}: {e['msg'].removeprefix('Value error, ')}{got}".removeprefix(": "))
    return "; ".join(lines)


def _sliced(value: Any) -> bool:
    return isinstance(value, str | list | tuple)


def _regular(path: Path, mode: int, remedy: str) -> None:
    if stat.S_ISREG(mode):
        return
    if stat.S_ISLNK(mode):
        raise InputError(f"{path}: a symbolic link, which could lead anywhere; put the file itself in its place")
    kinds = {stat.S_ISDIR: "a folder", stat.S_ISFIFO: "a FIFO", stat.S_ISSOCK: "a socket"}
    kind = next((said for test, said in kinds.items() if test(mode)), "a device")
    raise InputError(f"{path}: {kind}, not a regular file; {remedy}")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {shown(key)} stands twice")
        found[key] = value
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:_SHOWN]} is too large a number")
    return value
