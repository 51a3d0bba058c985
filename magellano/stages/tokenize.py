"""tokenize: data files -> packed token shards, a fixed held-out split, the rejected rows and balanced books."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from magellano.data import formats, readers, schema, shards, splitting
from magellano.data.accounting import Accounting
from magellano.data.formats import Document
from magellano.data.packing import Packer, Piece, pieces
from magellano.data.splitting import Split
from magellano.data.template import Template, Unfit
from magellano.errors import InputError
from magellano.profile import DataConfig
from magellano.progress import Progress
from magellano.tokenizer import RANKS_SHA256, Tokenizer

REJECTS = "rejects.jsonl"
SHARD_TOKENS = 8_000_000  # positions in a shard: 48 MB on disk, and what is in memory of each split


def run(
    out: Path, data: DataConfig, vocab_size: int, progress: Progress, tokenizer: Tokenizer | None = None
) -> dict[str, Any]:
    """Write shards, tokens.json and rejects.jsonl into `out`; returns the books and the number of packed rows.
    `tokenizer`: by default GPT-2's of that size.

    Raises InputError for what `readers.read` refuses, where no row is valid and where nothing can be held out.
    """
    tokenizer, books = tokenizer or Tokenizer(vocab_size), Accounting()
    which = {"ranks_sha256": RANKS_SHA256} if type(tokenizer) is Tokenizer else {}
    writers = {split: _Writer(out, split, data.seq_len, tokenizer, books) for split in Split}
    with open(out / REJECTS, "x", encoding="utf-8") as rejects:
        reader = _Reader(data, tokenizer, books, rejects, progress)
        for split, document in splitting.assign(reader.documents(), data.held_out, data.seed):
            writers[split].add(document)
    for writer in writers.values():
        writer.finish()
    books.check()
    rows = {str(split): writer.rows for split, writer in writers.items()}
    shards.write_facts(
        out, vocab_size=vocab_size, seq_len=data.seq_len, rows=rows, format=data.format,
        end_of_text=tokenizer.end_of_text, files=dict(reader.files), accounting=books.to_dict(), **which,
    )  # fmt: skip
    return {"rows": rows, "seq_len": data.seq_len, "vocab_size": vocab_size, "accounting": books.to_dict()}


class _Reader:
    """Rows -> valid, different documents of tokens; rejects are written down with their reason."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, books: Accounting, rejects: Any, progress: Progress):
        self._data, self._tokenizer, self._books, self._rejects, self._progress = (
            data,
            tokenizer,
            books,
            rejects,
            progress,
        )
        self._template = Template.read(Path(data.template).expanduser()) if data.template else None
        self._seen: set[bytes] = set()
        self._first_reject = ""
        self.files: Counter[str] = Counter()  # rows read by file

    def documents(self) -> Iterator[Document]:
        total, done = len(self._data.files) or 1, 0
        for chunk in readers.read(self._data):
            self._books.rows_read += len(chunk.rows)
            self.files[chunk.file] += len(chunk.rows)
            yield from self._tokenize(self._distinct(self._valid(chunk)))
            done += chunk.last
            total = max(total, done)
            self._progress(done, total, rows=self._books.rows_read, tokens=self._books.tokens_in)
        if self._books.used == 0:
            count = self._books.rejected.total()
            raise InputError(
                f"all {count} rows are rejected, the first: {self._first_reject}; correct the data or data.format"
            )

    def _valid(self, chunk: readers.Chunk) -> Iterator[list[formats.Segment]]:
        """What the rows say that the schema, and the chat template if there is one, take."""
        bad = {reject.row: reject for reject in schema.validate(chunk.rows, self._data.format)}
        for index, row in enumerate(chunk.rows):
            if reject := bad.get(index):
                self._reject(chunk, index, reject.column, str(reject.reason))
                continue
            try:
                parts = formats.segments(row, self._data.format, self._template)
            except Unfit as e:
                self._reject(chunk, index, formats.COLUMNS[self._data.format][0], str(e))
                continue
            yield parts

    def _reject(self, chunk: readers.Chunk, index: int, column: str, reason: str) -> None:
        self._books.rejected[f"{column} {reason}"] += 1
        where = {"file": chunk.file, "row": chunk.numbers[index], "column": column, "reason": reason}
        self._rejects.write(json.dumps(where, ensure_ascii=False) + "\n")
        self._first_reject = self._first_reject or f"{chunk.file}: row {chunk.numbers[index]}: {column} {reason}"

    def _distinct(self, rows: Iterable[list[formats.Segment]]) -> Iterator[tuple[bytes, list[formats.Segment]]]:
        """Each row's segments with its content's digest, without those seen before if the profile says so."""
        for parts in rows:
            digest = formats.digest(parts)
            if self._data.deduplicate and digest in self._seen:
                self._books.duplicates += 1
                continue
            if self._data.deduplicate:
                self._seen.add(digest)
            yield digest, parts

    def _tokenize(self, rows: Iterator[tuple[bytes, list[formats.Segment]]]) -> Iterator[Document]:
        """A chunk is encoded at once: threads share the work."""
        chunk = list(rows)
        texts = iter(self._tokenizer.encode_many([part.text for _, parts in chunk for part in parts]))
        for digest, parts in chunk:
            document = formats.document(((part, next(texts)) for part in parts), self._tokenizer.end_of_text, digest)
            self._books.used += 1
            self._books.tokens_in += len(document.targets)
            yield document


class _Writer:
    """One split: documents -> pieces -> packed rows -> shards."""

    def __init__(self, out: Path, split: Split, seq_len: int, tokenizer: Tokenizer, books: Accounting):
        self._out, self._split, self._tokenizer, self._books = out, split, tokenizer, books
        self._packer = Packer(seq_len, tokenizer.end_of_text)
        self._bytes_per_token = tokenizer.bytes_per_token()
        self._waiting: list[list[Piece]] = []
        self._rows_per_shard = max(1, SHARD_TOKENS // seq_len)
        self._shards = 0
        self.rows = 0

    def add(self, document: Document) -> None:
        self._books.documents[str(self._split)] += 1
        self._books.split += len(document.targets) > self._packer.seq_len
        for piece in pieces(document, self._packer.seq_len, self._tokenizer.end_of_text):
            if self._count(piece):
                self._waiting += self._packer.add(piece)
        if len(self._waiting) >= self._rows_per_shard:
            self._write()

    def finish(self) -> None:
        self._waiting += self._packer.finish()
        if self._waiting:
            self._write()

    def _count(self, piece: Piece) -> bool:
        """Enter a piece in the books. False where nothing in it counts: it could teach and measure nothing."""
        books, size, counted = self._books, len(piece.targets), int(piece.counts.sum())
        if counted == 0:
            books.dropped += size
        elif self._split is Split.TRAIN:
            books.trained += counted
            books.context += size - counted
        else:
            books.held_out += size
            books.held_out_counted += counted
            books.held_out_bytes += int(self._bytes_per_token[piece.targets[piece.counts == 1]].sum(dtype=np.int64))
        return counted > 0

    def _write(self) -> None:
        rows = self._packer.arrays(self._waiting)
        shards.write_shard(self._out, self._split, self._shards, rows)
        self._books.padding += rows.tokens.size - sum(len(piece.tokens) for row in self._waiting for piece in row)
        self._shards += 1
        self.rows += len(self._waiting)
        self._waiting = []
