"""What tokenizing holds at once: it does not grow with the data, but for the digests of the rows that were there."""

import json
import random
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magellano.data import limits, parse, readers, schema
from magellano.data.accounting import Accounting
from magellano.data.formats import Document
from magellano.data.seen import FULL, SIZE, Seen
from magellano.data.splitting import Split
from magellano.profile import DataConfig
from magellano.progress import silent
from magellano.stages import tokenize
from magellano.tokenizer import Tokenizer

ROWS, MORE = 600, 2400  # the fewer fill the rows that first fit keeps open


def write(path: Path, rows: int) -> DataConfig:
    """Short rows, every fourth one there before."""
    path.write_text("".join(json.dumps({"text": f"row {n - n % 4 // 3}"}) + "\n" for n in range(rows)))
    return DataConfig(files=(str(path),), seq_len=16, held_out=0.45)


def peak(folder: Path, rows: int) -> int:
    folder.mkdir()
    config = write(folder / "a.jsonl", rows)
    (folder / "out").mkdir()
    tracemalloc.start()
    try:
        books = tokenize.run(folder / "out", config, 300, silent)["accounting"]
        assert (books["used"], books["duplicates"]) == (rows * 3 // 4, rows // 4)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_four_times_the_rows_take_the_same_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "CHUNK_ROWS", 100)
    monkeypatch.setattr(tokenize, "SHARD_TOKENS", 512)
    monkeypatch.setattr(schema, "validate", lambda rows, format: [])  # pandera under tracemalloc takes a minute
    peak(tmp_path / "warm", 100)
    few, many = peak(tmp_path / "few", ROWS), peak(tmp_path / "many", MORE)
    assert many - few < 160 * (MORE - ROWS), f"{few:,} bytes, then {many:,}"  # a document's arrays alone take 400


def test_short_documents_wait_as_packed_rows(tmp_path: Path) -> None:
    writer = tokenize._Writer(tmp_path, Split.TRAIN, 256, Tokenizer(300), [Accounting()], [])
    taken = []
    tracemalloc.start()
    try:
        for _ in range(2):
            for _ in range(3000):  # the first ones fill the rows that first fit keeps open
                writer.add(Document(np.arange(6, dtype=np.uint16), np.ones(6, dtype=np.uint8)))
            taken.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert 6 * 6 <= (taken[1] - taken[0]) / 3000 < 120, f"{taken} bytes"


def test_rows_are_read_when_they_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, rows = [0], parse.rows

    def counted(source: Any) -> Iterator[Any]:
        for row in rows(source):
            read[0] += 1
            yield row

    monkeypatch.setattr(limits, "CHUNK_ROWS", 50)
    monkeypatch.setattr(parse, "rows", counted)
    used = 0
    for chunk in readers.read(write(tmp_path / "a.jsonl", 500)):
        used += len(chunk.rows)
        assert read[0] == used
    assert used == 500


def test_digests_are_told_apart_and_take_few_bytes() -> None:
    rng, seen, known = random.Random(1), Seen(slots=4), set()
    alike = [b"\1" * 8 + rng.randbytes(8) for _ in range(40)]  # that all want one place
    digests = [*alike, *(rng.randbytes(16) for _ in range(3000))]
    for digest in [*digests, *rng.sample(digests, 1000)]:
        assert seen.add(digest) is (digest not in known)
        known.add(digest)
    assert len(seen) == len(known) == len(digests)
    assert SIZE / FULL <= len(seen._table) / len(seen) <= 2 * SIZE / FULL + 1
