"""Rows from files, folders, globs, the built-in sets and the hub, in a fixed order, each with its file and row number.

`datasets` reads the hub. Files are read here, since it reads them whole or by the thousand rows whatever their size,
unpacks what looks packed, and guesses types (the text "2020-01-02" becomes a date, "NA" a null): `parse` and `parquet`
stay within `limits`. A plain text file is one document. Row numbers begin at 1 and are, in JSON Lines, line numbers.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from magellano.data import hub, limits, parquet, parse
from magellano.data.formats import COLUMNS, OPTIONAL
from magellano.data.parse import Numbered
from magellano.data.sources import Kind, Source, opened
from magellano.data.template import Template
from magellano.errors import InputError
from magellano.names import DataFormat
from magellano.profile import DataConfig


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one file with their numbers. The last chunk of a file has `last` set and may be empty."""

    file: str
    numbers: list[int]
    rows: list[dict[str, Any]]
    last: bool = False
    source: int = 0  # number of its source


def contents(config: DataConfig) -> list[tuple[str, str]]:
    """Name and SHA-256 of each file that the config reads, or the hub's data set and its revision, and of the chat
    template. Raises InputError as `read` does.
    """
    found = []
    if config.template:
        template = Template.read(Path(config.template).expanduser())
        found.append(("chat template", hashlib.sha256(template.source.encode("utf-8")).hexdigest()))
    if config.sources:
        named = zip(config.sources, config.parts, strict=True)
        own = [(source.name, entry) for source, part in named for entry in contents(_bare(part))]
        return [*found, *((f"{name}: {file}", content) for name, (file, content) in own)]
    if config.hub:
        return [*found, (f"hub:{config.hub}/{config.split}", hub.revision(config.hub))]
    with opened(config) as sources:
        for source in sources:
            with open(source.path, "rb") as file:
                found.append((source.name, hashlib.file_digest(file, "sha256").hexdigest()))
    return found


def _bare(config: DataConfig) -> DataConfig:
    return config.model_copy(update={"template": ""})


def digest(config: DataConfig) -> str:
    """SHA-256 of what the config reads: names and contents, or the hub's revision. Raises InputError as `read` does."""
    return digest_of(config, contents(config))


def digest_of(config: DataConfig, found: list[tuple[str, str]]) -> str:
    """`digest` from what `contents` found."""
    total = hashlib.sha256()
    for name, content in found:
        line = f"hub\0{config.hub}\0{config.split}\0{content}" if config.hub else f"{name}\0{content}\n"
        total.update(line.encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def read(config: DataConfig) -> Iterator[Chunk]:
    """All rows that the config names, source by source, at most `max_rows` of each (0: all).

    Raises InputError with file, row and remedy for what cannot be read; a data set without rows is one.
    """
    if config.sources:
        for number, part in enumerate(config.parts):
            yield from (replace(chunk, source=number) for chunk in read(part))
        return
    left = config.max_rows or None
    empty = True
    for chunk in _all(config):
        if left is not None:
            chunk = Chunk(chunk.file, chunk.numbers[:left], chunk.rows[:left], chunk.last or len(chunk.rows) >= left)
            left -= len(chunk.rows)
        empty = empty and not chunk.rows
        yield chunk
        if left == 0:
            return
    if empty:
        raise InputError(f"{config.hub or ', '.join(config.files)}: the data set is empty; give files with rows")


def _all(config: DataConfig) -> Iterator[Chunk]:
    if config.hub:
        yield from _checked(_sized(hub.rows(config)), f"hub:{config.hub}/{config.split}", config.format)
        return
    with opened(config) as sources:
        for source in sources:
            yield from _checked(_file_rows(source, config.format), source.label, config.format)


def _checked(rows: Numbered, file: str, format: DataFormat) -> Iterator[Chunk]:
    """Rows in chunks; the first chunk of a file must have the format's columns."""
    wanted = COLUMNS[format]
    numbers: list[int] = []
    chunk: list[dict[str, Any]] = []
    size, first = 0, True
    for number, row, row_bytes in rows:
        numbers.append(number)
        chunk.append(row)
        size += row_bytes
        if len(chunk) == limits.CHUNK_ROWS or size >= limits.CHUNK_BYTES:
            if first:
                _check_columns(chunk, file, format, wanted)
            first = False
            yield Chunk(file, numbers, chunk)
            numbers, chunk, size = [], [], 0
    if first and chunk:
        _check_columns(chunk, file, format, wanted)
    yield Chunk(file, numbers, chunk, last=True)


def _check_columns(rows: list[dict[str, Any]], file: str, format: DataFormat, wanted: tuple[str, ...]) -> None:
    found = sorted({str(key) for row in rows for key in row})
    if missing := [name for name in wanted if name not in found]:
        fitting = [f"data.format = {other.value!r} reads them" for other, c in COLUMNS.items() if {*c} <= {*found}]
        raise InputError(
            f"{file}: no column {', '.join(missing)} (format {format.value!r} wants {', '.join(wanted)}; "
            f"found {', '.join(found) or 'none'}); {' or '.join(fitting) or 'rename the columns or change data.format'}"
        )


def _file_rows(source: Source, format: DataFormat) -> Numbered:
    try:
        if source.kind is Kind.PARQUET:
            yield from parquet.rows(source, COLUMNS[format], OPTIONAL.get(format, ()))
        else:
            yield from parse.rows(source)
    except PermissionError:
        raise InputError(
            f"{source.label}: no permission to read it; change its mode or drop it from data.files"
        ) from None


def _sized(rows: Iterator[tuple[int, dict[str, Any]]]) -> Numbered:
    """Rows of the hub with about their size."""
    for number, row in rows:
        yield number, row, parse.row_bytes(row)
