"""Documents packed into rows of T tokens, first fit, with the borders marked where a model must reset its state.

Row:      | EOT a1 a2 a3 | EOT b1 b2 | pad pad |
targets   | a1  a2 a3 EOT| b1 b2 EOT | EOT EOT |
reset     | 1   0  0  0  | 1  0  0   | 1   0   |
A document longer than T is cut in pieces. Each piece begins, reset, with the token that was the last target before it,
so every target is predicted exactly once. The two documents of a pair stand behind each other in one row, so that pairs
are whole in whatever rows become a batch; rows of pairs hold nothing else.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from magellano.data.formats import Document
from magellano.data.shards import Rows

OPEN_ROWS = 64  # rows that first fit may still fill: bounds memory and time, and costs about a percent of padding


@dataclass(frozen=True)
class Piece:
    """A document, a part of it, or a pair, that fits a row: uint16, uint16 and uint8 arrays of one length, at most T.
    `second`: where the second document of a pair begins; 0: there is none.
    """

    tokens: np.ndarray
    targets: np.ndarray
    counts: np.ndarray
    second: int = 0


def pieces(document: Document, seq_len: int, end_of_text: int) -> Iterator[Piece]:
    """Cut a document at every T targets; most documents are one piece, and a pair always is."""
    tokens = np.concatenate([np.array([end_of_text], dtype=np.uint16), document.targets[:-1]])
    if document.second:
        tokens[document.second] = end_of_text
        yield Piece(tokens, document.targets, document.counts, document.second)
        return
    for first in range(0, len(tokens), seq_len):
        part = slice(first, first + seq_len)
        yield Piece(tokens[part], document.targets[part], document.counts[part])


class Packer:
    """First fit over a bounded number of open rows. The rows depend on the pieces and their order alone."""

    def __init__(self, seq_len: int, end_of_text: int, open_rows: int = OPEN_ROWS):
        self.seq_len, self._end_of_text, self._most = seq_len, end_of_text, open_rows
        self._open: list[list[Piece]] = []
        self._free: list[int] = []

    def add(self, piece: Piece) -> list[list[Piece]]:
        """Place a piece; returns the rows that this closed: a full one, or the oldest when too many are open."""
        size = len(piece.tokens)
        assert 0 < size <= self.seq_len, size
        place = next((i for i, free in enumerate(self._free) if free >= size), None)
        if place is None:
            self._open.append([])
            self._free.append(self.seq_len)
            place = len(self._open) - 1
        self._open[place].append(piece)
        self._free[place] -= size
        if self._free[place] == 0:
            return [self._close(place)]
        return [self._close(0)] if len(self._open) > self._most else []

    def finish(self) -> list[list[Piece]]:
        """Close what is still open."""
        return [self._close(0) for _ in range(len(self._open))]

    def _close(self, place: int) -> list[Piece]:
        del self._free[place]
        return self._open.pop(place)

    def arrays(self, rows: Iterable[list[Piece]]) -> Rows:
        """Closed rows as arrays, padded with end-of-text that counts nowhere."""
        made = [self._row(row) for row in rows]
        return Rows(*(np.stack(column) for column in zip(*made, strict=True)))

    def _row(self, row: list[Piece]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        tokens, targets = (np.full(self.seq_len, self._end_of_text, dtype=np.uint16) for _ in range(2))
        counts, reset = (np.zeros(self.seq_len, dtype=np.uint8) for _ in range(2))
        start = 0
        for piece in row:
            end = start + len(piece.tokens)
            tokens[start:end], targets[start:end], counts[start:end] = piece.tokens, piece.targets, piece.counts
            reset[[start, start + piece.second]] = 1
            start = end
        if start < self.seq_len:
            reset[start] = 1
        return tokens, targets, counts, reset
