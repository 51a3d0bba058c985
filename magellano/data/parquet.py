"""Rows of a Parquet file with bounded memory: the footer is judged, then every value's size, then the rows are read.

Text columns stay dictionaries (one copy of each value and a number a row) until the sizes are known: 2 MB of such a
file can say 19 GB. The file is read twice for that, which costs a few percent of what tokenizing its text does.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from magellano.data import limits
from magellano.data.parse import Numbered
from magellano.data.sources import Source
from magellano.errors import InputError

_DELTA = "DELTA_BYTE_ARRAY"


def rows(source: Source, wanted: tuple[str, ...], optional: tuple[str, ...] = ()) -> Numbered:
    """The wanted columns and those optional ones that the file has, row by row with their size in bytes; a file without
    all wanted gives its first row's names with nulls, so that the reader can say what it found."""
    import pyarrow as pa  # type: ignore[import-untyped]

    try:
        yield from _rows(source, wanted, optional)
    except (pa.ArrowException, OSError, ValueError, OverflowError) as e:
        if isinstance(e, InputError | PermissionError):
            raise
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
        raise InputError(f"{source.label}: not a readable parquet file ({reason}); write it again") from None


def _rows(source: Source, wanted: tuple[str, ...], optional: tuple[str, ...]) -> Numbered:
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    size = source.path.stat().st_size
    _check_length(source, size)
    names = pq.ParquetFile(source.path).schema_arrow.names
    columns = [name for name in wanted + optional if name in names]
    if not set(wanted) <= set(names):
        yield 1, dict.fromkeys(names), 0
        return
    if twice := [name for name in columns if names.count(name) > 1]:
        raise InputError(f"{source.label}: two columns are named {twice[0]!r}; write it again with one")
    most = max(limits.PARQUET_FLOOR, limits.PARQUET_EXPANSION * size)
    _check_footer(source, pq.ParquetFile(source.path).metadata, columns, most)
    total = 0
    for _, _, sizes in _batches(source, columns):
        total += int(sizes.sum())
        if total > most:
            raise _bomb(source, f"columns {', '.join(columns)} hold more than {most // limits.MIB} MiB")
    for first, batch, sizes in _batches(source, columns):
        ends = np.cumsum(sizes) // limits.CHUNK_BYTES  # slices of about that many bytes
        cuts = [0, *(np.flatnonzero(np.diff(ends)) + 1).tolist(), len(sizes)]
        for a, b in pairwise(cuts):
            for i, row in enumerate(_python(source, batch.slice(a, b - a), first + a), a):
                yield first + i, row, int(sizes[i])


def _check_length(source: Source, size: int) -> None:
    with open(source.path, "rb") as file:
        file.seek(max(0, size - 8))
        tail = file.read(8)
    if len(tail) == 8 and tail[4:] == b"PAR1" and (length := int.from_bytes(tail[:4], "little")) > limits.FOOTER_BYTES:
        raise InputError(
            f"{source.label}: not a readable parquet file (a footer of {length} bytes, at most {limits.FOOTER_BYTES}); "
            "write it again with fewer columns and row groups"
        )


def _check_footer(source: Source, metadata: Any, columns: list[str], most: int) -> None:
    """Refuse on what the file says about itself, before a page is unpacked."""
    total = metadata.num_rows * limits.PARQUET_CELL
    for group in range(metadata.num_row_groups):
        for column in (metadata.row_group(group).column(i) for i in range(metadata.num_columns)):
            if column.path_in_schema.split(".")[0] not in columns:
                continue
            if column.total_uncompressed_size > limits.COLUMN_BYTES:
                raise InputError(
                    f"{source.label}: column {column.path_in_schema} of row group {group + 1} is "
                    f"{column.total_uncompressed_size // limits.MIB} MiB, at most {limits.COLUMN_BYTES // limits.MIB}; "
                    "write it with smaller row groups (pandas: to_parquet(..., row_group_size=10_000))"
                )
            total += max(column.total_uncompressed_size, column.num_values * 8)
    if total > most:
        raise _bomb(source, f"{metadata.num_rows} rows, unpacked {total // limits.MIB} MiB")


def _bomb(source: Source, what: str) -> InputError:
    return InputError(
        f"{source.label}: {what}, over {limits.PARQUET_EXPANSION} times the file's size; "
        "write the rows that you mean as JSON Lines, each once"
    )


def _batches(source: Source, columns: list[str]) -> Iterator[tuple[int, Any, np.ndarray]]:
    """(number of its first row, batch, bytes of each row); InputError for a row longer than a row may be."""
    import pyarrow.parquet as pq

    metadata = pq.ParquetFile(source.path).metadata
    leaves = [metadata.schema.column(i) for i in range(metadata.num_columns)]
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    texts = [  # delta-encoded text cannot become a dictionary
        leaf.path
        for i, leaf in enumerate(leaves)
        if leaf.physical_type == "BYTE_ARRAY" and not any(_DELTA in group.column(i).encodings for group in groups)
    ]
    file = pq.ParquetFile(source.path, read_dictionary=texts, buffer_size=limits.MIB, pre_buffer=False)
    first = 1
    for group in range(metadata.num_row_groups):
        count = _batch_rows(metadata.row_group(group), columns)
        for batch in file.iter_batches(count, row_groups=[group], columns=columns, use_threads=False):
            sizes = np.full(batch.num_rows, limits.PARQUET_CELL, dtype=np.int64)
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                sizes += (bytes_of := _sizes(column))
                if len(long := np.flatnonzero(bytes_of > limits.ROW_BYTES)):
                    raise InputError(
                        f"{source.label}: row {first + int(long[0])}: {name} is longer than "
                        f"{limits.ROW_BYTES // limits.MIB} MiB; cut it into several rows or remove it"
                    )
            yield first, batch, sizes
            first += batch.num_rows


def _batch_rows(group: Any, columns: list[str]) -> int:
    """Rows to read at once: fewer where values are delta-encoded, since each may repeat all of the one before."""
    count = limits.CHUNK_ROWS
    for column in (group.column(i) for i in range(group.num_columns)):
        if column.path_in_schema.split(".")[0] in columns and _DELTA in column.encodings:
            count = min(count, max(1, limits.PARQUET_FLOOR // max(1, column.total_uncompressed_size)))
    return count


def _sizes(array: Any) -> np.ndarray:
    """Bytes that each value of an Arrow array spells, int64 [n]; 8 for one that is no text, and for its place."""
    import pyarrow as pa
    import pyarrow.compute as pc  # type: ignore[import-untyped]

    kind = array.type
    if pa.types.is_dictionary(kind):
        spelled = _sizes(array.dictionary)
        taken = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
        return spelled[taken] if len(spelled) else np.full(len(array), 8, dtype=np.int64)
    if pa.types.is_string(kind) or pa.types.is_binary(kind) or pa.types.is_large_string(kind):
        return pc.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64) + 8
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        offsets = array.offsets.to_numpy()
        inner = _sizes(array.values[int(offsets[0]) : int(offsets[-1])])
        sums = np.concatenate([[0], np.cumsum(inner, dtype=np.int64)])
        return sums[offsets[1:] - offsets[0]] - sums[offsets[:-1] - offsets[0]] + 8
    if pa.types.is_struct(kind):
        fields = [_sizes(array.field(i)) for i in range(kind.num_fields)]
        return sum(fields, np.full(len(array), 8, dtype=np.int64))
    return np.full(len(array), 8, dtype=np.int64)


def _python(source: Source, batch: Any, first: int) -> list[dict[str, Any]]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        for i in range(batch.num_rows):
            try:
                batch.slice(i, 1).to_pylist()
            except UnicodeDecodeError as e:
                raise InputError(
                    f"{source.label}: row {first + i}: a text with invalid UTF-8 at its byte {e.start}; "
                    "write the row again as UTF-8"
                ) from None
        raise
