"""JSON, CSV and text from bytes with bounded time and memory; each mistake is one InputError with its place."""

import csv
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np

from magellano.data import limits
from magellano.data.sources import Kind, Source
from magellano.errors import InputError

Numbered = Iterator[tuple[int, dict[str, Any], int]]  # row number, row, bytes that it was read from

BOM = b"\xef\xbb\xbf"
# What begins a file that was packed or saved as something other than UTF-8 text, and what to do about it.
_FOREIGN = {
    b"\x1f\x8b": "a gzip file, not text; unpack it (gunzip)",
    b"PK\x03\x04": "a zip archive, not text; unpack it (unzip)",
    b"\x28\xb5\x2f\xfd": "a zstd file, not text; unpack it (unzstd)",
    b"\xfd7zXZ\x00": "an xz file, not text; unpack it (unxz)",
    b"BZh": "a bzip2 file, not text; unpack it (bunzip2)",
    b"PAR1": "a Parquet file; name it .parquet",
    b"\xff\xfe": "UTF-16, not UTF-8; save the file as UTF-8",
    b"\xfe\xff": "UTF-16, not UTF-8; save the file as UTF-8",
}
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"?', re.DOTALL)  # an open one reaches to the end: linear
_CLOSES, _SEPARATES = (ord("]"), ord("}")), ord(",")


def rows(source: Source) -> Numbered:
    """The rows of a file of any kind but Parquet. A packed file is refused and not unpacked: it could hold anything."""
    with open(source.path, "rb") as file:
        head = file.read(4096)
        for magic, what in _FOREIGN.items():
            if head.startswith(magic):
                raise InputError(f"{source.label}: row 1: this is {what}")
        file.seek(len(BOM) if head.startswith(BOM) else 0)
        match source.kind:
            case Kind.TEXT:
                yield from _text(file, source)
            case Kind.CSV:
                yield from _csv(file, source)
            case Kind.JSON if head.removeprefix(BOM).lstrip().startswith(b"["):
                yield from _array(file, source)
            case _:
                yield from _json_lines(file, source)


def _lines(file: BinaryIO, source: Source) -> Iterator[tuple[int, bytes, str]]:
    """Numbered lines, as bytes and as text, none longer than a row may be."""
    number, offset = 0, file.tell()
    unit = "line" if source.kind is Kind.CSV else "row"
    while line := file.readline(limits.ROW_BYTES + 1):
        number += 1
        if len(line) > limits.ROW_BYTES:
            raise _too_long(f"{source.label}: {unit} {number}: the line", "cut it into several rows or remove it")
        yield number, line, _decode(line, source, offset, number)
        offset += len(line)


def _decode(data: bytes, source: Source, offset: int, line: int) -> str:
    """`data`, which begins at this offset and line of the file, as text."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        line += data.count(b"\n", 0, e.start)
        raise InputError(
            f"{source.label}: line {line}: invalid UTF-8 at byte {offset + e.start} of the file "
            f"(0x{data[e.start]:02x}); save the file as UTF-8"
        ) from None


def _too_long(what: str, remedy: str, most: int = limits.ROW_BYTES) -> InputError:
    return InputError(f"{what} is longer than {most // limits.MIB} MiB; {remedy}")


def _text(file: BinaryIO, source: Source) -> Numbered:
    offset, data = file.tell(), file.read(limits.ROW_BYTES + 1)
    if len(data) > limits.ROW_BYTES:
        raise _too_long(f"{source.label}: row 1: the text", "cut it into several files")
    text = _decode(data, source, offset, 1)
    yield 1, {"text": text.replace("\r\n", "\n").replace("\r", "\n")}, len(data)


def _json_lines(file: BinaryIO, source: Source) -> Numbered:
    for number, line, text in _lines(file, source):
        if text.strip():
            where = f"{source.label}: row {number}"
            check_json(line, where, limits.ROW_VALUES)
            yield number, _object(_parse(text.rstrip("\r\n"), where, lines=False), where), len(line)


def _array(file: BinaryIO, source: Source) -> Numbered:
    offset, data = file.tell(), file.read(limits.ARRAY_BYTES + 1)
    if len(data) > limits.ARRAY_BYTES:
        raise _too_long(
            f"{source.label}: the JSON array", "write it as JSON Lines, one row a line, to .jsonl", limits.ARRAY_BYTES
        )
    check_json(data, source.label, limits.ARRAY_VALUES)
    text = _decode(data, source, offset, 1)
    del data
    for number, row in enumerate(_parse(text, source.label, lines=True), 1):
        where = f"{source.label}: row {number}"
        if (size := row_bytes(row)) > limits.ROW_BYTES:
            raise _too_long(where, "cut it into several rows or remove it")
        yield number, _object(row, where), size


def row_bytes(row: Any) -> int:
    """About how many bytes a row takes that came from no line of its own."""
    return len(str(row).encode("utf-8", "surrogatepass"))


def check_json(data: bytes, where: str, most: int) -> None:
    """InputError where JSON is nested too deeply or has more than `most` values, before anything parses it."""
    if data.count(b"[") + data.count(b"{") <= limits.JSON_DEPTH and data.count(b",") <= most:
        return
    bare = np.frombuffer(_STRING.sub(b"", data), dtype=np.uint8)
    opens = (bare == ord("[")) | (bare == ord("{"))
    depth = np.cumsum(opens.astype(np.int8) - np.isin(bare, _CLOSES).astype(np.int8), dtype=np.int32)
    if (deepest := int(depth.max(initial=0))) > limits.JSON_DEPTH:
        raise InputError(
            f"{where}: JSON nested too deeply ({deepest} levels, at most {limits.JSON_DEPTH}); flatten or remove it"
        )
    if (values := int(opens.sum() + (bare == _SEPARATES).sum())) > most:
        raise InputError(f"{where}: {values} JSON values, at most {most}; cut it into several rows or remove it")


def _parse(text: str, where: str, lines: bool) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as e:
        place = f"line {e.lineno}, column {e.colno}" if lines else f"column {e.colno}"
        raise InputError(f"{where}: malformed JSON at {place} ({e.msg}); correct or remove it") from None
    except RecursionError:  # only where the caller stands deep already
        raise InputError(f"{where}: JSON nested too deeply to read; remove it") from None
    except ValueError as e:  # a whole number of thousands of digits
        raise InputError(f"{where}: malformed JSON ({str(e).split(';')[0]}); correct or remove it") from None


def _object(row: Any, where: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise InputError(f"{where}: a JSON {type(row).__name__}, not an object; correct or remove it")
    return row


class _Records:
    """Lines for the csv module, which joins those between quotes: bounds what one record may take."""

    def __init__(self, file: BinaryIO, source: Source, separator: str):
        self._lines, self._source, self._separator = _lines(file, source), source, separator
        self.line = self.size = self._values = 0

    def __iter__(self) -> Iterator[str]:
        for number, line, text in self._lines:
            self.line = number
            self.size += len(line)
            self._values += text.count(self._separator)
            where = f"{self._source.label}: the row that reaches line {self.line}"
            if self.size > limits.ROW_BYTES:
                raise _too_long(where, "close its quotes or cut it into several rows")
            if self._values > limits.ROW_VALUES:
                raise InputError(f"{where} has more than {limits.ROW_VALUES} fields; correct or remove it")
            yield text

    def next(self) -> None:
        self.size = self._values = 0


def _csv(file: BinaryIO, source: Source) -> Numbered:
    """Every field as text (no guessed types, "NA" stays a word); fields that a short record lacks are null."""
    csv.field_size_limit(limits.ROW_BYTES)
    separator = "\t" if source.path.suffix.lower() == ".tsv" else ","
    lines = _Records(file, source, separator)
    header: list[str] | None = None
    number = 0
    try:
        for record in csv.reader(lines, delimiter=separator, strict=True):
            size = lines.size
            lines.next()
            if not record:
                continue
            if header is None:
                header = record
                if twice := sorted({name for name in header if header.count(name) > 1}, key=header.index):
                    raise InputError(f"{source.label}: two columns are named {twice[0]!r}; rename one")
                continue
            if len(record) > len(header):
                raise csv.Error(f"expected {len(header)} fields in line {lines.line}, saw {len(record)}")
            record += [None] * (len(header) - len(record))  # type: ignore[list-item]
            number += 1
            yield number, dict(zip(header, record, strict=True)), size
    except csv.Error as e:
        reason = "a carriage return inside a line" if "new-line" in str(e) else str(e)
        reason = reason if "line" in reason else f"{reason}, line {lines.line}"
        raise InputError(
            f"{source.label}: not a readable CSV file (row {number + 1}: {reason}); correct that line or its quotes"
        ) from None
