"""Which files a profile names: paths, folders, globs and built-in sets, in a fixed order, each once."""

import glob
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from magellano.data import builtin
from magellano.errors import InputError
from magellano.profile import DataConfig

log = logging.getLogger(__name__)

_BUILTIN = "builtin:"


class Kind(StrEnum):
    """How a file is read."""

    LINES = "lines"  # JSON Lines
    JSON = "json"  # one array of rows, or JSON Lines
    PARQUET = "parquet"
    CSV = "csv"
    TEXT = "text"


SUFFIXES = {
    ".jsonl": Kind.LINES, ".ndjson": Kind.LINES, ".json": Kind.JSON, ".parquet": Kind.PARQUET, ".csv": Kind.CSV,
    ".tsv": Kind.CSV, ".txt": Kind.TEXT,
}  # fmt: skip


@dataclass(frozen=True)
class Source:
    """A file to read. `label` is for messages and `name` for the digest: relative to what the profile named."""

    path: Path
    label: str
    name: str
    kind: Kind


@contextmanager
def opened(config: DataConfig) -> Iterator[list[Source]]:
    """The files that the config names, in reading order, each once; built-in sets exist for as long as this lasts."""
    with tempfile.TemporaryDirectory(prefix="magellano-") as folder:
        found: dict[Path, Source] = {}
        for item in config.files:
            for source in _builtin(item, Path(folder)) if item.startswith(_BUILTIN) else _expand(item):
                found.setdefault(source.path.resolve(), source)
        yield list(found.values())


def _builtin(item: str, folder: Path) -> list[Source]:
    path = builtin.write(item.removeprefix(_BUILTIN), folder)
    return [Source(path, item, item, _kind(path))]


def _expand(item: str) -> list[Source]:
    path = Path(item).expanduser()
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return [Source(path, str(path), path.name, _kind(path))]
    if glob.has_magic(item):
        matches = sorted(Path(p) for p in glob.glob(str(path), recursive=True) if Path(p).is_file())
        if not matches:
            raise InputError(f"{item}: matches no file; correct the pattern in data.files")
        root = Path(os.path.commonpath([match.parent for match in matches]))
        return [Source(match, str(match), match.relative_to(root).as_posix(), _kind(match)) for match in matches]
    if path.exists():
        raise InputError(f"{item}: neither a file nor a folder; give one of these in data.files")
    raise InputError(f"{item}: no such file or folder; correct the path in data.files")


def _folder(folder: Path) -> list[Source]:
    """All files of known suffixes under a folder, without hidden ones; what else lies there is named in the log."""
    sources, others = [], []
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in files:
            path = Path(parent, name)
            if name.startswith(".") or not path.is_file():
                continue
            if path.suffix.lower() in SUFFIXES:
                sources.append(Source(path, str(path), path.relative_to(folder).as_posix(), _kind(path)))
            else:
                others.append(path.relative_to(folder).as_posix())
    if not sources:
        raise InputError(f"{folder}: no file with a known suffix in this folder ({', '.join(SUFFIXES)})")
    if others:
        log.warning("%s: left out %d files of other suffixes: %s", folder, len(others), ", ".join(sorted(others)[:5]))
    return sorted(sources, key=lambda source: source.name)


def _kind(path: Path) -> Kind:
    try:
        return SUFFIXES[path.suffix.lower()]
    except KeyError:
        raise InputError(f"{path}: unknown suffix {path.suffix!r}; known are {', '.join(SUFFIXES)}") from None
