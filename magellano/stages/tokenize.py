"""tokenize: data files -> packed token shards, a fixed held-out split, the rejected rows and balanced books."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from magellano.data import formats, mixing, readers, schema, shards, splitting, toon
from magellano.data.accounting import Accounting
from magellano.data.formats import Document
from magellano.data.packing import Packer, Piece, pieces
from magellano.data.seen import Seen
from magellano.data.shards import Rows
from magellano.data.splitting import Split
from magellano.data.template import Template, Unfit
from magellano.errors import InputError
from magellano.names import DataRender
from magellano.profile import DataConfig
from magellano.progress import Progress
from magellano.tokenizer import RANKS_SHA256, Tokenizer

REJECTS = "rejects.jsonl"
SHARD_TOKENS = 8_000_000  # positions in a shard: 48 MB on disk, and what is in memory of each split
_Said = tuple[int, list[formats.Segment], list[toon.Record]]  # index in the chunk, what is said, its records
_Distinct = tuple[int, bytes, list[formats.Segment]]


def run(
    out: Path, data: DataConfig, vocab_size: int, progress: Progress, tokenizer: Tokenizer | None = None
) -> dict[str, Any]:
    """Write shards, tokens.json and rejects.jsonl into `out`; returns the books and the number of packed rows.
    `tokenizer`: by default GPT-2's of that size.

    Raises InputError for what `readers.read` refuses, where no row is valid and where nothing can be held out.
    """
    tokenizer = tokenizer or Tokenizer(vocab_size)
    own = [Accounting() for _ in data.parts]  # by source
    which: dict[str, Any] = {"ranks_sha256": RANKS_SHA256} if type(tokenizer) is Tokenizer else {}
    if data.pairs:
        which["pairs"] = True
    held_out = _Writer(out, Split.HELD_OUT, data.seq_len, tokenizer, own, shards=[])
    owners: list[int] = []  # of the training shards
    trained = [_Writer(out, Split.TRAIN, data.seq_len, tokenizer, own, owners, n) for n in range(len(own))]
    with open(out / REJECTS, "x", encoding="utf-8") as rejects:
        reader = _Reader(data, tokenizer, own, rejects, progress)
        if reader.template is not None:
            reader.template.keep(out)
        for split, document in splitting.assign(reader.documents(), data.held_out, data.seed):
            (held_out if split is Split.HELD_OUT else trained[document.source]).add(document)
    for writer in (held_out, *trained):
        writer.finish()
    books = Accounting.total(own)
    for part in (books, *own):
        part.check()
    rows = {str(Split.TRAIN): sum(writer.rows for writer in trained), str(Split.HELD_OUT): held_out.rows}
    told = books.to_dict()
    if data.sources:
        mix, told["sources"] = _mixed(data, trained, owners, own)
        which |= {"mix": mix}
    shards.write_facts(
        out, vocab_size=vocab_size, seq_len=data.seq_len, rows=rows, format=data.format,
        end_of_text=tokenizer.end_of_text, files=dict(reader.files), accounting=told, **which,
    )  # fmt: skip
    return {"rows": rows, "seq_len": data.seq_len, "vocab_size": vocab_size, "accounting": told}


def _mixed(
    data: DataConfig, trained: list["_Writer"], owners: list[int], own: list[Accounting]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """How `shards.Shards` mixes the sources, and the books of each: with its weight and how often an epoch shows it."""
    rows, names = [writer.rows for writer in trained], [source.name for source in data.sources]
    slots = mixing.slots(rows, [source.weight for source in data.sources], names)
    told = {
        source.name: {"weight": source.weight, "times": round(count / had, 3), **books.to_dict()}
        for source, count, had, books in zip(data.sources, slots, rows, own, strict=True)
    }
    return {"shards": owners, "slots": slots, "seed": data.seed}, told


class _Reader:
    """Rows -> valid, different documents of tokens; rejects are written down with their reason."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, own: list[Accounting], rejects: Any, progress: Progress):
        self._data, self._tokenizer, self._own = data, tokenizer, own
        self._rejects, self._progress = rejects, progress
        self._formats = [part.format for part in data.parts]
        self.template = Template.read(Path(data.template).expanduser()) if data.template else None
        self._seen = Seen()
        self._first_reject = ""
        self.files: Counter[str] = Counter()  # rows read by file

    def documents(self) -> Iterator[Document]:
        total, done = sum(len(part.files) or 1 for part in self._data.parts), 0
        for chunk in readers.read(self._data):
            self._own[chunk.source].rows_read += len(chunk.rows)
            self.files[chunk.file] += len(chunk.rows)
            yield from self._tokenize(chunk, self._distinct(chunk.source, self._valid(chunk)))
            done += chunk.last
            total = max(total, done)
            books = Accounting.total(self._own)
            self._progress(done, total, rows=books.rows_read, tokens=books.tokens_in)
        if all(books.used == 0 for books in self._own):
            count = Accounting.total(self._own).rejected.total()
            raise InputError(
                f"all {count} rows are rejected, the first: {self._first_reject}; correct the data or data.format"
            )

    def _valid(self, chunk: readers.Chunk) -> Iterator[_Said]:
        """What the rows say that the schema, and the chat template if there is one, take, and their records."""
        format = self._formats[chunk.source]
        bad = {reject.row: reject for reject in schema.validate(chunk.rows, format)}
        for index, row in enumerate(chunk.rows):
            if reject := bad.get(index):
                self._reject(chunk, index, reject.column, str(reject.reason))
                continue
            records: list[toon.Record] = []

            def render(text: str, records: list[toon.Record] = records) -> str:
                text, found = toon.rendered(text) if self._data.render is DataRender.TOON else (text, [])
                records += found
                return text

            try:
                parts = formats.segments(row, format, self.template, render)
            except Unfit as e:
                self._reject(chunk, index, formats.COLUMNS[format][0], str(e))
                continue
            yield index, parts, records

    def _reject(self, chunk: readers.Chunk, index: int, column: str, reason: str) -> None:
        self._own[chunk.source].rejected[f"{column} {reason}"] += 1
        where = {"file": chunk.file, "row": chunk.numbers[index], "column": column, "reason": reason}
        self._rejects.write(json.dumps(where, ensure_ascii=False) + "\n")
        self._first_reject = self._first_reject or f"{chunk.file}: row {chunk.numbers[index]}: {column} {reason}"

    def _distinct(self, source: int, rows: Iterable[_Said]) -> Iterator[_Distinct]:
        """Each row's segments with its content's digest, without those seen before if the profile says so."""
        for index, parts, records in rows:
            digest = formats.digest(parts)
            if self._data.deduplicate and not self._seen.add(digest):
                self._own[source].duplicates += 1
                continue
            self._weigh(self._own[source], records)
            yield index, digest, parts

    def _weigh(self, books: Accounting, records: list[toon.Record]) -> None:
        made = [record for record in records if record.toon]
        books.toon_records += len(made)
        books.toon_kept += len(records) - len(made)
        tokens = self._tokenizer.encode_many([text for record in made for text in (record.json, record.toon)])
        books.json_tokens += sum(map(len, tokens[::2]))
        books.toon_tokens += sum(map(len, tokens[1::2]))

    def _tokenize(self, chunk: readers.Chunk, rows: Iterator[_Distinct]) -> Iterator[Document]:
        """A chunk is encoded at once: threads share the work. A pair longer than a row is rejected."""
        found, books = list(rows), self._own[chunk.source]
        texts = iter(self._tokenizer.encode_many([part.text for _, _, parts in found for part in parts]))
        for index, digest, parts in found:
            encoded = ((part, next(texts)) for part in parts)
            document = formats.document(encoded, self._tokenizer.end_of_text, digest, chunk.source)
            if document.second and len(document.targets) > self._data.seq_len:
                self._reject(chunk, index, "prompt", "with both answers is longer than data.seq_len tokens")
                continue
            books.used += 1
            books.tokens_in += len(document.targets)
            yield document


class _Writer:
    """One split: documents -> pieces -> packed rows -> shards."""

    def __init__(
        self, out: Path, split: Split, seq_len: int, tokenizer: Tokenizer, own: list[Accounting], shards: list[int],
        source: int = 0,
    ):  # fmt: skip
        """`shards`: the source of each shard of the split, which its writers share. A writer of training rows has those
        of one source alone, the other those of all.
        """
        self._out, self._split, self._tokenizer, self._own = out, split, tokenizer, own
        self._packer = Packer(seq_len, tokenizer.end_of_text)
        self._bytes_per_token = tokenizer.bytes_per_token()
        self._waiting: list[Rows] = []  # as arrays: the pieces of short documents take many times as much
        self._rows_per_shard = max(1, SHARD_TOKENS // seq_len)
        self._shards, self._source = shards, source
        self.rows = 0

    def add(self, document: Document) -> None:
        books = self._own[document.source]
        books.documents[str(self._split)] += 1
        books.split += len(document.targets) > self._packer.seq_len
        for piece in pieces(document, self._packer.seq_len, self._tokenizer.end_of_text):
            if self._count(piece, books):
                self._close(self._packer.add(piece))
        if len(self._waiting) >= self._rows_per_shard:
            self._write()

    def finish(self) -> None:
        self._close(self._packer.finish())
        if self._waiting:
            self._write()

    def _count(self, piece: Piece, books: Accounting) -> bool:
        """Enter a piece in the books. False where nothing in it counts: it could teach and measure nothing."""
        size, counted = len(piece.targets), int(piece.counts.sum())
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

    def _close(self, rows: list[list[Piece]]) -> None:
        for row in rows:
            self._waiting.append(self._packer.arrays([row]))
            self._own[self._source].padding += self._packer.seq_len - sum(len(piece.tokens) for piece in row)

    def _write(self) -> None:
        shards.write_shard(self._out, self._split, len(self._shards), shards.together(self._waiting))
        self._shards.append(self._source)
        self.rows += len(self._waiting)
        self._waiting = []
