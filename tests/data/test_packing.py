"""Packing and splitting: no token lost, masks and borders right, sides that follow from content alone."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magellano.data.formats import Document
from magellano.data.packing import Packer, Piece, pieces
from magellano.data.shards import Rows
from magellano.data.splitting import Split, assign, draw
from magellano.errors import InputError

END = 99


def document(tokens: list[int], counts: list[int] | None = None, digest: bytes = b"") -> Document:
    mask = [1] * (len(tokens) + 1) if counts is None else counts
    return Document(np.array([*tokens, END], np.uint16), np.array(mask, np.uint8), digest)


def pack(documents: list[Document], seq_len: int, open_rows: int = 64) -> Rows:
    packer = Packer(seq_len, END, open_rows)
    rows = [row for d in documents for piece in pieces(d, seq_len, END) for row in packer.add(piece)]
    return packer.arrays(rows + packer.finish())


def found_pieces(rows: Rows) -> list[tuple[tuple[int, ...], ...]]:
    """What lies between two resets, read back from the arrays; padding (nothing counted, only end-of-text) left out."""
    found = []
    for tokens, targets, weights, reset in zip(rows.tokens, rows.targets, rows.weights, rows.reset, strict=True):
        starts = [*np.flatnonzero(reset), len(tokens)]
        for a, b in pairwise(starts):
            piece = tuple(tuple(x[a:b].tolist()) for x in (tokens, targets, weights))
            padding = set(piece[0]) | set(piece[1]) == {END} and not any(piece[2])
            if not padding:
                found.append(piece)
    return found


# Tokens below END, so that padding can be told apart; at least one, so that a document is not end-of-text alone.
documents = st.lists(
    st.lists(st.tuples(st.integers(0, END - 1), st.integers(0, 1)), min_size=1, max_size=40).map(
        lambda pairs: document([t for t, _ in pairs], [*(c for _, c in pairs), 1])
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=200, deadline=None)
@given(documents=documents, seq_len=st.integers(2, 24), open_rows=st.integers(1, 5))
def test_rows_hold_every_piece_once_with_its_mask(documents: list[Document], seq_len: int, open_rows: int) -> None:
    rows = pack(documents, seq_len, open_rows)
    wanted = [
        tuple(tuple(x.tolist()) for x in (p.tokens, p.targets, p.counts))
        for d in documents
        for p in pieces(d, seq_len, END)
    ]
    assert Counter(found_pieces(rows)) == Counter(wanted)
    assert (rows.reset[:, 0] == 1).all()
    assert rows.weights.sum() == sum(d.counts.sum() for d in documents)


@settings(max_examples=100, deadline=None)
@given(documents=documents, seq_len=st.integers(2, 24), seed=st.integers(0, 9))
def test_the_order_of_documents_changes_rows_but_not_the_books(
    documents: list[Document], seq_len: int, seed: int
) -> None:
    shuffled = [documents[i] for i in np.random.default_rng(seed).permutation(len(documents))]
    assert Counter(found_pieces(pack(documents, seq_len))) == Counter(found_pieces(pack(shuffled, seq_len)))


@settings(max_examples=100, deadline=None)
@given(tokens=st.lists(st.integers(0, END - 1), min_size=1, max_size=100), seq_len=st.integers(1, 30))
def test_pieces_of_a_long_document_predict_each_target_once(tokens: list[int], seq_len: int) -> None:
    parts = list(pieces(document(tokens), seq_len, END))
    assert np.concatenate([p.targets for p in parts]).tolist() == [*tokens, END]
    assert np.concatenate([p.tokens for p in parts]).tolist() == [END, *tokens]
    assert all(len(p.tokens) == seq_len for p in parts[:-1])
    assert all(b.tokens[0] == a.targets[-1] for a, b in pairwise(parts))


def test_a_row_looks_as_documented() -> None:
    rows = pack([document([1, 2, 3], [0, 0, 1, 1]), document([4, 5])], 9)
    assert rows.tokens.tolist() == [[END, 1, 2, 3, END, 4, 5, END, END]]
    assert rows.targets.tolist() == [[1, 2, 3, END, 4, 5, END, END, END]]
    assert rows.weights.tolist() == [[0, 0, 1, 1, 1, 1, 1, 0, 0]]
    assert rows.reset.tolist() == [[1, 0, 0, 0, 1, 0, 0, 1, 0]]
    assert [a.dtype for a in (rows.tokens, rows.targets, rows.weights, rows.reset)] == ["u2", "u2", "u1", "u1"]


def test_first_fit_takes_the_oldest_row_with_room_and_closes_the_oldest_when_too_many_are_open() -> None:
    packer = Packer(4, END, open_rows=2)
    sizes = [3, 3, 1, 2, 3]  # the 1 fills the first row; the last 3 opens a third and closes the oldest
    made = [Piece(*(np.full(n, i, t) for t in (np.uint16, np.uint16, np.uint8))) for i, n in enumerate(sizes)]
    closed = [[[int(p.tokens[0]) for p in row] for row in packer.add(piece)] for piece in made]
    assert closed == [[], [], [[0, 2]], [], [[1]]]
    assert [[int(p.tokens[0]) for p in row] for row in packer.finish()] == [[3], [4]]


digests = st.lists(st.binary(min_size=16, max_size=16), min_size=2, max_size=60, unique=True)


@settings(max_examples=200, deadline=None)
@given(digests=digests, share=st.floats(0.001, 0.499), seed=st.integers(0, 5), repeat=st.booleans())
def test_each_side_gets_a_document_and_every_document_a_side(
    digests: list[bytes], share: float, seed: int, repeat: bool
) -> None:
    given_ = [document([1], digest=d) for d in digests * (1 + repeat)]
    sides: dict[Split, list[bytes]] = {split: [] for split in Split}
    for split, d in assign(given_, share, seed):
        sides[split].append(d.digest)
    assert Counter(sides[Split.TRAIN] + sides[Split.HELD_OUT]) == Counter(d.digest for d in given_)
    assert all(sides.values())
    assert not set(sides[Split.TRAIN]) & set(sides[Split.HELD_OUT])
    moved = [d for split in Split for d in set(sides[split]) if (draw(d, seed) < share) != (split is Split.HELD_OUT)]
    assert len(moved) <= 1


@settings(max_examples=100, deadline=None)
@given(digests=digests, more=digests, seed=st.integers(0, 5))
def test_documents_keep_their_side_when_data_grows(digests: list[bytes], more: list[bytes], seed: int) -> None:
    def sides(items: list[bytes]) -> dict[bytes, Split]:
        return {d.digest: split for split, d in assign([document([1], digest=x) for x in items], 0.3, seed)}

    before, after = sides(digests), sides([*more, *digests])
    natural = len({draw(d, seed) < 0.3 for d in digests}) == 2  # else one document was moved to the empty side
    assert sum(before[d] is not after[d] for d in digests) <= (0 if natural else 1)


def test_the_share_held_out_is_the_one_asked_for() -> None:
    held = sum(draw(i.to_bytes(16, "little"), 0) < 0.05 for i in range(20_000))
    assert 900 < held < 1100  # 1000 +- 3.2 standard deviations


def test_another_seed_holds_out_others() -> None:
    ids = [i.to_bytes(16, "little") for i in range(200)]
    assert {d for d in ids if draw(d, 0) < 0.2} != {d for d in ids if draw(d, 1) < 0.2}


@pytest.mark.parametrize("copies", [1, 3])
def test_one_document_cannot_be_split(copies: int) -> None:
    with pytest.raises(InputError, match="only one different document"):
        list(assign([document([1], digest=b"x")] * copies, 0.1, 0))
