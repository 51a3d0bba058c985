"""Tokens of preference pairs for tests, packed as the tokenize stage packs them."""

from pathlib import Path

import numpy as np

from magellano.data import shards
from magellano.data.formats import Document
from magellano.data.packing import Packer, pieces

END = 299


def document(prompt: list[int], chosen: list[int], rejected: list[int]) -> Document:
    """A pair as `formats.document` makes it."""
    targets = [*prompt, *chosen, END, *prompt, *rejected, END]
    counts = [0] * len(prompt) + [1] * (len(chosen) + 1) + [0] * len(prompt) + [1] * (len(rejected) + 1)
    second = len(prompt) + len(chosen) + 1
    return Document(np.array(targets, dtype=np.uint16), np.array(counts, dtype=np.uint8), second=second)


def rows(documents: list[Document], seq_len: int) -> shards.Rows:
    packer, closed = Packer(seq_len, END), []
    for one in documents:
        for piece in pieces(one, seq_len, END):
            closed += packer.add(piece)
    return packer.arrays([*closed, *packer.finish()])


def make_tokens(folder: Path, count: int = 24, seq_len: int = 32, **more: bool) -> Path:
    """A tokens folder: answers of small numbers are preferred to those of large ones, of uneven length."""
    folder.mkdir()
    rng, counts = np.random.default_rng(0), {}
    for split, size in (("train", count), ("held_out", max(4, count // 4))):
        made = []
        for _ in range(size):
            n = rng.integers(1, 5, 2)
            small, large = rng.integers(0, 20, n[0]), rng.integers(20, 40, n[1])
            made.append(document(rng.integers(0, 40, 2).tolist(), small.tolist(), large.tolist()))
        packed = rows(made, seq_len)
        counts[split] = shards.write_split(folder, split, [packed])
    shards.write_facts(folder, vocab_size=300, seq_len=seq_len, rows=counts, **{"pairs": True, **more})
    return folder
