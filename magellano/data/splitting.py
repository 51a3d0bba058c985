"""Which documents are held out. A document's side is a hash of its content and the seed, so that it keeps its side
while data is added, removed or reordered, and copies of one document never stand on both sides."""

import hashlib
from collections.abc import Iterable, Iterator
from enum import StrEnum

from magellano.data.formats import Document
from magellano.errors import InputError


class Split(StrEnum):
    """The two parts of a data set; also the stems of their shards."""

    TRAIN = "train"
    HELD_OUT = "held_out"


def draw(digest: bytes, seed: int) -> float:
    """A number in [0, 1) from content and seed alone; documents that draw less than the held-out share are held out."""
    hashed = hashlib.blake2b(digest, digest_size=8, salt=seed.to_bytes(16, "little")).digest()
    return (int.from_bytes(hashed, "big") >> 11) / 2**53


def assign(documents: Iterable[Document], held_out: float, seed: int) -> Iterator[tuple[Split, Document]]:
    """Each document with its side, as a stream. Both sides get at least one: should all fall on one side, the document
    that drew nearest to the other moves there. Raises InputError where fewer than two different documents came."""
    sides: set[Split] = set()
    nearest: list[Document] = []  # and its copies: held back until both sides have a document
    others = False
    for document in documents:
        x = draw(document.digest, seed)
        side = Split.HELD_OUT if x < held_out else Split.TRAIN
        sides.add(side)
        if len(sides) == 2:
            yield from ((_other(side), waiting) for waiting in nearest)  # they came from the first side
            nearest = []
            yield side, document
        elif not nearest or document.digest == nearest[0].digest:
            nearest.append(document)
        else:
            others = True
            if abs(x - held_out) < abs(draw(nearest[0].digest, seed) - held_out):
                yield from ((side, waiting) for waiting in nearest)
                nearest = [document]
            else:
                yield side, document
    if nearest and not others:
        raise InputError(
            "only one different document is left after checks: nothing can be held out; give more rows, "
            "or cut the text into several files or JSONL rows"
        )
    for document in nearest:
        yield _other(next(iter(sides))), document


def _other(side: Split) -> Split:
    return Split.TRAIN if side is Split.HELD_OUT else Split.HELD_OUT
