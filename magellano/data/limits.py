"""What a data file may ask of this machine, in one place. The limits are fixed: a row beyond them is no training text.

Together they keep reading and tokenizing under 1 GB of memory, whatever a file claims to be and however long the data
set is, but for 23 to 70 bytes for each different row (see `seen`) and, with several sources, 100 MB for each.
"""

import re

MIB = 1 << 20

ROW_BYTES = 16 * MIB
"""Longest row: a line, a CSV record, the wanted columns of a Parquet row, a text file. Its tokens, one a byte at worst,
are Python lists of 8 to 36 bytes each while they are made."""

CHUNK_BYTES = 8 * MIB
"""Rows are checked and tokenized together until they have this many bytes (or CHUNK_ROWS): what those lists sum to."""

CHUNK_ROWS = 1000

ARRAY_BYTES = 32 * MIB
"""Longest file that is one JSON array: it is in memory as bytes, as text (4 bytes a character where one is an emoji)
and as rows at once. JSON Lines have no such limit."""

JSON_DEPTH = 100
"""Deepest nesting. Python's parser recurses, and its own limit depends on who calls it."""

ROW_VALUES, ARRAY_VALUES = 1_000_000, 4_000_000
"""Most values in one row and in one JSON array of rows: an empty object takes 3 bytes of file and 72 of memory."""

TOON_VALUES = 100_000
"""Most values in the JSON records of one prompt that become TOON: writing it and reading it back is Python, 5 s for so
many at worst. What is beyond stays JSON and is counted."""

BLANK_RUN = 100_000
"""Longest run of blank characters: the tokenizer's regular expression gives up, and aborts, before a million."""

PARQUET_EXPANSION, PARQUET_FLOOR = 200, 64 * MIB
"""Text in a Parquet file, as a multiple of the file's size, where it is more than the floor. Ordinary text comes to 2
to 20; 2 MB of dictionary can say 19 GB."""

PARQUET_CELL = 64
"""Bytes that a Parquet row counts at least, so that a billion nulls, which need no space, are not free."""

COLUMN_BYTES = 256 * MIB
"""Largest column of one row group, unpacked: a page of it, at worst all of it, is in memory twice."""

FOOTER_BYTES = 16 * MIB
"""Largest footer of a Parquet file: it is parsed before anything in it can be believed."""

_BLANKS = re.compile(rf"(?<!\s)\s{{{BLANK_RUN + 1}}}")  # tried at the start of a run only: linear


def blank_run(text: str) -> bool:
    """Whether a run of blank characters is too long. Such a run fills one of the blocks looked at first."""
    block = BLANK_RUN // 2
    filled = any(text[i].isspace() and text[i : i + block].isspace() for i in range(0, len(text), block))
    return len(text) > BLANK_RUN and filled and _BLANKS.search(text) is not None
