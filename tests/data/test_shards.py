"""Shards: what is written is what is read, in any order, and damage is said."""

import json
from pathlib import Path

import numpy as np
import pytest

from magellano.data import shards
from magellano.data.shards import Rows, Shards, indices
from magellano.errors import InputError

T = 8


def rows(count: int, seed: int) -> Rows:
    rng = np.random.default_rng(seed)
    tokens, targets = (rng.integers(0, 50257, (count, T)).astype(np.uint16) for _ in range(2))
    weights, reset = (rng.integers(0, 2, (count, T)).astype(np.uint8) for _ in range(2))
    return Rows(tokens, targets, weights, reset)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    assert shards.write_split(tmp_path, "train", [rows(5, 0), rows(3, 1)]) == 8
    shards.write_facts(tmp_path, vocab_size=50257, seq_len=T, rows={"train": 8}, note="more facts")
    return tmp_path


def test_rows_come_back_across_shards_in_the_order_asked(folder: Path) -> None:
    split = Shards(folder, "train")
    assert (split.rows, split.seq_len, split.vocab_size, split.facts["note"]) == (8, T, 50257, "more facts")
    batch = split.batch([7, 0, 4, 5])
    for name, dtype in (("tokens", "i4"), ("targets", "i4"), ("weights", "f4"), ("reset", "u1")):
        whole = np.concatenate([getattr(rows(5, 0), name), getattr(rows(3, 1), name)])
        assert np.array_equal(getattr(batch, name), whole[[7, 0, 4, 5]])
        assert getattr(batch, name).dtype == dtype


@pytest.mark.parametrize("row", [-1, 8])
def test_rows_outside_are_refused(folder: Path, row: int) -> None:
    with pytest.raises(IndexError):
        Shards(folder, "train").batch([row])


def test_a_shard_is_never_overwritten(folder: Path) -> None:
    with pytest.raises(FileExistsError):
        shards.write_split(folder, "train", [rows(1, 2)])


def test_missing_shards_facts_and_splits_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match="0 rows of 'held_out'"):
        Shards(folder, "held_out")
    (folder / "train-00001.safetensors").unlink()
    with pytest.raises(InputError, match="5 rows of 'train' in the shards, 8 in"):
        Shards(folder, "train")
    (folder / shards.FACTS).unlink()
    with pytest.raises(InputError, match="no tokens here"):
        Shards(folder, "train")


def test_a_truncated_shard_and_another_schema_are_refused(folder: Path) -> None:
    path = folder / "train-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"train-00000\.safetensors: damaged"):
        Shards(folder, "train")
    facts = folder / shards.FACTS
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"schema": 2}))
    with pytest.raises(InputError, match="schema 2, this version reads 1"):
        Shards(folder, "train")


def test_indices_are_endless_seeded_permutations_addressed_by_number() -> None:
    whole = indices(0, 30, 10, seed=3)
    for epoch in range(3):
        assert sorted(whole[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert not np.array_equal(whole[:10], whole[10:20])
    assert np.array_equal(indices(7, 9, 10, seed=3), whole[7:16])
    assert not np.array_equal(indices(0, 30, 10, seed=4), whole)
