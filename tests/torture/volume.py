"""A data set of 100 MB and one of a tenth, tokenized by processes of their own: what they hold at most."""

import json
import os
import random
import resource
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from magellano.profile import DataConfig
from magellano.progress import silent
from magellano.stages import tokenize
from tests.torture.outcome import Row, Share

BYTES = 100_000_000
WORDS = [f"word{n}" for n in range(400)]
A_ROW = 140  # bytes: the table of digests while it grows, beside what it grows from
SLACK = 150 << 20  # shards of 8 million positions, which few rows do not fill


def part(share: Share) -> Iterator[Row]:
    yield volume(share)


def volume(share: Share) -> Row:
    """Rows of 20 to 2,000 bytes, every fifth one there before."""
    size = share.of(BYTES, 4_000_000)
    row = Row("a data set larger than what is held", "tokenize.run in a process of its own")
    told = []
    with tempfile.TemporaryDirectory() as name:
        for part in (size // 10, size):
            path = Path(name, f"{part}.jsonl")
            rows, copies = write(path, part, random.Random(share.seed))
            books, peak = run(path)
            row.tries += 1
            found = (books["rows_read"], books["duplicates"])
            row.check(found == (rows, copies), f"{part:,} bytes: {found} rows and duplicates, written {rows, copies}")
            told.append((rows, peak))
            path.unlink()
    (few, before), (many, after) = told
    row.check(after - before <= A_ROW * (many - few) + SLACK, f"{before:,} bytes resident, {after:,} with all")
    row.note = (
        f"{many:,} rows, {size / 1e6:.0f} MB: {after / 2**20:.0f} MiB resident, {before / 2**20:.0f} with a tenth"
    )
    return row


def write(path: Path, size: int, rng: random.Random) -> tuple[int, int]:
    """Rows and copies among them."""
    rows = copies = 0
    last = ""
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < size:
            copy = rows % 5 == 4
            last = last if copy else f"{rows} {' '.join(rng.choices(WORDS, k=rng.choice((2, 20, 300))))}"
            file.write(json.dumps({"text": last}) + "\n")
            rows, copies = rows + 1, copies + copy
    return rows, copies


def run(path: Path) -> tuple[dict[str, int], int]:
    """The books, and the bytes resident at most."""
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.close(reader)
        with tempfile.TemporaryDirectory() as out, os.fdopen(writer, "w") as answer:
            config = DataConfig(files=(str(path),), seq_len=512)
            books = tokenize.run(Path(out), config, 50257, silent)["accounting"]
            unit = 1 if sys.platform == "darwin" else 1024
            peak = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            json.dump([{name: books[name] for name in ("rows_read", "duplicates")}, peak], answer)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        text = answer.read()
    os.waitpid(child, 0)
    books, peak = json.loads(text or '[{"rows_read": 0, "duplicates": 0}, 0]')
    return books, peak
