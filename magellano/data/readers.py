"""Rows from files, folders, globs, the built-in sets and the hub, in a fixed order, each with its file and row number.

`datasets` reads everything, as a stream. Two of its habits are kept away from the data: JSON goes through it as lines
of text and is parsed here (its own JSON reader guesses types: the text "2020-01-02" becomes a date), and every CSV
field is read as text (else the word "NA" becomes a null). A plain text file is one document. Row numbers begin at 1
and are, in JSON Lines, line numbers.
"""

import glob
import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from magellano.data import hub
from magellano.data.formats import COLUMNS
from magellano.data.sources import Kind, Source, opened
from magellano.errors import InputError
from magellano.names import DataFormat
from magellano.profile import DataConfig

CHUNK_ROWS = 1000


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one file with their numbers. The last chunk of a file has `last` set and may be empty."""

    file: str
    numbers: list[int]
    rows: list[dict[str, Any]]
    last: bool = False


def digest(config: DataConfig) -> str:
    """SHA-256 of what the config reads: names and contents, or the hub's revision. Raises InputError as `read` does."""
    total = hashlib.sha256()
    if config.hub:
        total.update(f"hub\0{config.hub}\0{config.split}\0{hub.revision(config.hub)}".encode())
        return total.hexdigest()
    with opened(config) as sources:
        for source in sources:
            with open(source.path, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
            total.update(f"{source.name}\0{content}\n".encode("utf-8", "surrogateescape"))
    return total.hexdigest()


def read(config: DataConfig) -> Iterator[Chunk]:
    """All rows that the config names, at most `max_rows` of them (0: all).

    Raises InputError with file, row and remedy for what cannot be read; a data set without rows is one.
    """
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
        yield from _checked(hub.rows(config), f"hub:{config.hub}/{config.split}", config.format)
        return
    with opened(config) as sources, tempfile.TemporaryDirectory(prefix="magellano-") as cache:
        for source in sources:
            yield from _checked(_file_rows(source, cache), source.label, config.format)


def _checked(rows: Iterator[tuple[int, dict[str, Any]]], file: str, format: DataFormat) -> Iterator[Chunk]:
    """Rows in chunks; the first chunk of a file must have the format's columns."""
    wanted = COLUMNS[format]
    numbers: list[int] = []
    chunk: list[dict[str, Any]] = []
    first = True
    for number, row in rows:
        numbers.append(number)
        chunk.append(row)
        if len(chunk) == CHUNK_ROWS:
            if first:
                _check_columns(chunk, file, format, wanted)
            first = False
            yield Chunk(file, numbers, chunk)
            numbers, chunk = [], []
    if first and chunk:
        _check_columns(chunk, file, format, wanted)
    yield Chunk(file, numbers, chunk, last=True)


def _check_columns(rows: list[dict[str, Any]], file: str, format: DataFormat, wanted: tuple[str, ...]) -> None:
    found = sorted({str(key) for row in rows for key in row})
    if missing := [name for name in wanted if name not in found]:
        raise InputError(
            f"{file}: no column {', '.join(missing)} (format {format.value!r} wants {', '.join(wanted)}; "
            f"found {', '.join(found) or 'none'}); rename the columns or change data.format"
        )


def _file_rows(source: Source, cache: str) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        if source.path.stat().st_size == 0 and source.kind in (Kind.LINES, Kind.JSON, Kind.CSV):
            return
        match source.kind:
            case Kind.TEXT:
                yield from enumerate(_stream(source, cache, "text", sample_by="document", encoding="utf-8-sig"), 1)
            case Kind.LINES:
                yield from _json_lines(source, cache)
            case Kind.JSON:
                yield from _json(source, cache)
            case Kind.PARQUET:
                yield from enumerate(_stream(source, cache, "parquet"), 1)
            case Kind.CSV:
                yield from _csv(source, cache)
    except UnicodeDecodeError:
        raise InputError(_invalid_utf8(source)) from None
    except PermissionError:
        raise InputError(
            f"{source.label}: no permission to read it; change its mode or drop it from data.files"
        ) from None


def _stream(source: Source, cache: str, builder: str, **options: Any) -> Iterator[dict[str, Any]]:
    """The rows of one file by one of `datasets`' builders."""
    import pyarrow  # type: ignore[import-untyped]

    with hub.network(allowed=False) as datasets:
        try:
            # Its own globbing would take the brackets of a file's name for a pattern.
            files = [glob.escape(str(source.path.resolve()))]
            stream = datasets.load_dataset(
                builder, data_files=files, split="train", streaming=True, cache_dir=cache, **options
            )
            for batch in stream.with_format("arrow").iter(batch_size=CHUNK_ROWS):
                yield from batch.to_pylist()
        except pyarrow.ArrowInvalid as e:
            line = str(e).splitlines()[0]
            raise InputError(f"{source.label}: not a readable {builder} file ({line}); write it again") from None


def _json_lines(source: Source, cache: str) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = _stream(source, cache, "text", sample_by="line", encoding="utf-8-sig")
    for number, line in enumerate(lines, 1):
        if line["text"].strip():
            yield number, _object(_parse(line["text"], source, number), source, number)


def _json(source: Source, cache: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with open(source.path, "rb") as file:
        array = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")
    if not array:
        yield from _json_lines(source, cache)
        return
    whole = next(_stream(source, cache, "text", sample_by="document", encoding="utf-8-sig"))
    for number, row in enumerate(_parse(whole["text"], source, None), 1):
        yield number, _object(row, source, number)


def _parse(text: str, source: Source, row: int | None) -> Any:
    where = source.label if row is None else f"{source.label}: row {row}"
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        place = f"line {e.lineno}, column {e.colno}" if row is None else f"column {e.colno}"
        raise InputError(f"{where}: malformed JSON at {place} ({e.msg}); correct or remove it") from None
    except RecursionError:
        raise InputError(f"{where}: JSON nested too deeply to read; remove it") from None


def _object(row: Any, source: Source, number: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(
            f"{source.label}: row {number}: a JSON {type(row).__name__}, not an object; correct or remove it"
        )
    return row


def _csv(source: Source, cache: str) -> Iterator[tuple[int, dict[str, Any]]]:
    import pandas as pd

    options = {"sep": "\t" if source.path.suffix.lower() == ".tsv" else ",", "encoding": "utf-8-sig"}
    try:
        columns = pd.read_csv(source.path, nrows=0, **options).columns  # type: ignore[call-overload]
        with hub.network(allowed=False) as datasets:
            features = datasets.Features({name: datasets.Value("string") for name in columns})
        yield from enumerate(_stream(source, cache, "csv", features=features, keep_default_na=False, **options), 1)
    except (pd.errors.ParserError, pd.errors.EmptyDataError) as e:
        reason = str(e).strip().splitlines()[0].removeprefix("Error tokenizing data. ")
        raise InputError(
            f"{source.label}: not a readable CSV file ({reason}); correct that line or its quotes"
        ) from None


def _invalid_utf8(source: Source) -> str:
    """Where a file stops being UTF-8, found by reading it line by line."""
    offset = 0
    with open(source.path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as e:
                return (
                    f"{source.label}: line {number}: invalid UTF-8 at byte {offset + e.start} of the file "
                    f"(0x{line[e.start]:02x}); save the file as UTF-8"
                )
            offset += len(line)
    return f"{source.label}: a text in it is not valid UTF-8; write the file again as UTF-8"
