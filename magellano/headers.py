"""The header of a safetensors file, checked before anything reads its tensors.

MLX's reader accepts overlapping tensors, holes, trailing bytes and sizes that do not fit its 32-bit shapes. So a file
must pass the `safetensors` package and the rules below, which are stricter: no name, size or type that no file of
this project has. Only the header is read: the tensors' bytes are the business of the store's SHA-256.

Check and use go through one descriptor, so that a file swapped under its name changes nothing. What remains: somebody
who may write into the very file can still change it after the check, and MLX then reads other numbers, at places that
were checked; folders are the owner's alone (0700) for that reason.
"""

import math
import os
import re
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from magellano import files
from magellano.errors import InputError

HEADER_BYTES = 16 << 20
TENSORS = 1 << 17
NAME_LENGTH = 256
DIMENSIONS, LARGEST_SIZE = 8, (1 << 31) - 1  # MLX keeps shapes in 32 bits
BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8,
}  # fmt: skip
REMEDY = "build it again, or get it again from where it came"
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*", re.ASCII)
_KEYS = {"dtype", "shape", "data_offsets"}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its type as safetensors names it, its shape, its place behind the header in bytes."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


Header = dict[str, Entry]
Check = Callable[[Header], None]  # raises InputError where a header is not what is wanted


@contextmanager
def checked(path: Path, check: Check | None = None, remedy: str = REMEDY) -> Iterator[tuple[str, Header]]:
    """(a path that leads to the checked file itself while the context lasts, its header). InputError where the file is
    not a regular one, breaks a rule, or `check` refuses its header.
    """
    with files.opened(path, remedy) as fd:
        try:
            header = _read(fd)
            with safe_open(files.by_descriptor(fd), framework="numpy") as file:
                if set(file.keys()) != set(header):
                    raise ValueError("the safetensors package sees other tensors in it")
        except (ValueError, OSError, SafetensorError) as e:
            raise InputError(f"{path}: damaged, not a readable safetensors file: {files.told(e)}; {remedy}") from None
        if check:
            check(header)
        yield files.by_descriptor(fd), header


def _read(fd: int) -> Header:
    size = os.fstat(fd).st_size
    if size < 8:
        raise ValueError(f"{size} bytes, too short for a header")
    (length,) = struct.unpack("<Q", files.read_at(fd, 0, 8))
    if length > min(size - 8, HEADER_BYTES):
        raise ValueError(f"a header of {length:,} bytes; there are {size - 8:,}, and {HEADER_BYTES:,} may be")
    text = files.read_at(fd, 8, length)
    if not text.startswith(b"{"):
        raise ValueError("its header does not start with {")
    return parse(text, size - 8 - length)


def parse(text: bytes, data_bytes: int) -> Header:
    """The tensors that the header `text` describes, in the order of their places. ValueError where it breaks a rule or
    they do not fill `data_bytes` bytes without gap or overlap.
    """
    described = files.parse(text)
    metadata = described.pop("__metadata__", None) or {}  # MLX writes null for none
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ must map names to strings")
    if len(described) > TENSORS:
        raise ValueError(f"{len(described):,} tensors, more than {TENSORS:,}")
    found = {name: _entry(name, value) for name, value in described.items()}
    ordered = sorted(found.items(), key=lambda item: (item[1].begin, item[1].end))
    at = 0
    for name, entry in ordered:
        if entry.begin != at:
            what = "overlaps the one before" if entry.begin < at else "leaves a hole before it"
            raise ValueError(f"tensor {name} {what}: it starts at byte {entry.begin:,}, not {at:,}")
        at = entry.end
    if at != data_bytes:
        raise ValueError(f"its tensors take {at:,} bytes, behind the header there are {data_bytes:,}")
    return dict(ordered)


def _entry(name: str, value: Any) -> Entry:
    if len(name) > NAME_LENGTH:
        raise ValueError(f"a tensor's name has {len(name):,} characters, more than {NAME_LENGTH}: {files.shown(name)}")
    if not _NAME.fullmatch(name) or ".." in name:
        raise ValueError(f"tensor {files.shown(name)}: a name has letters, digits and _ . : - alone, and is no path")
    if not isinstance(value, dict) or set(value) != _KEYS:
        raise ValueError(f"tensor {name}: must have dtype, shape and data_offsets, and nothing else")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BYTES:
        raise ValueError(f"tensor {name}: dtype {files.shown(dtype)} is not one of {', '.join(BYTES)}")
    if not _sizes(shape) or len(shape) > DIMENSIONS or any(n > LARGEST_SIZE for n in shape):
        raise ValueError(
            f"tensor {name}: shape {files.shown(shape)} is not a list of at most {DIMENSIONS} sizes to {LARGEST_SIZE:,}"
        )
    if not _sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"tensor {name}: data_offsets {files.shown(offsets)} are not two places")
    begin, end = offsets
    need = math.prod(shape) * BYTES[dtype]
    if end - begin != need:
        raise ValueError(
            f"tensor {name}: shape and dtype need {need:,} bytes, its data_offsets leave {files.shown(end - begin)}"
        )
    return Entry(dtype, tuple(shape), begin, end)


def _sizes(value: Any) -> bool:
    """Whole numbers from 0; true and 1.0 are none."""
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)
