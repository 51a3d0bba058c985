"""Packed rows on disk: written once as safetensors shards, read row by row without loading a shard.

A tokens folder holds `train-00000.safetensors`, ..., `held_out-00000.safetensors`, ... and `tokens.json`. Each shard
has tokens uint16 [rows, T], targets uint16 [rows, T], weights uint8 [rows, T] (1 where the target counts) and reset
uint8 [rows, T] (1 where the model's state restarts: the first token of a document, of a piece of one, or of padding).
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save

from magellano import headers
from magellano.data import mixing
from magellano.errors import InputError

FACTS, SCHEMA = "tokens.json", 1
_AGAIN = "run the tokenize stage again"
_DTYPES = {"tokens": np.uint16, "targets": np.uint16, "weights": np.uint8, "reset": np.uint8}


@dataclass(frozen=True)
class Rows:
    """Rows as they are stored, each [rows, T]."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    reset: np.ndarray


@dataclass(frozen=True)
class Batch:
    """Rows as a model takes them, each [B, T]: tokens and targets int32, weights float32, reset uint8."""

    tokens: np.ndarray
    targets: np.ndarray
    weights: np.ndarray
    reset: np.ndarray


def together(blocks: Sequence[Rows]) -> Rows:
    """The rows of all blocks."""
    return Rows(*(np.concatenate([getattr(rows, name) for rows in blocks]) for name in _DTYPES))


def write_split(folder: Path, split: str, blocks: Iterable[Rows]) -> int:
    """Write each block of rows as one shard; returns the number of rows."""
    count = 0
    for number, rows in enumerate(blocks):
        write_shard(folder, split, number, rows)
        count += len(rows.tokens)
    return count


def write_shard(folder: Path, split: str, number: int, rows: Rows) -> None:
    """Write one shard to a new file and wait until the disk has it."""
    arrays = {name: np.ascontiguousarray(getattr(rows, name)) for name in _DTYPES}
    for name, array in arrays.items():
        assert array.dtype == _DTYPES[name], (name, array.dtype)
        assert array.shape == arrays["tokens"].shape, (name, array.shape)
    with open(folder / f"{split}-{number:05d}.safetensors", "xb") as file:
        file.write(save(arrays))
        file.flush()
        os.fsync(file.fileno())


def write_facts(folder: Path, *, vocab_size: int, seq_len: int, rows: dict[str, int], **more: Any) -> None:
    """Write tokens.json: its schema, what is needed to read the shards, and whatever else is known about the data."""
    facts = {"schema": SCHEMA, "vocab_size": vocab_size, "seq_len": seq_len, "rows": rows, **more}
    text = json.dumps(facts, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with open(folder / FACTS, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def read_facts(folder: Path) -> dict[str, Any]:
    """tokens.json of a folder. Raises InputError where it is missing, malformed or of another version."""
    path = folder / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no tokens here; run the tokenize stage") from None
    except ValueError as e:
        raise InputError(f"{path}: not valid JSON ({e}); run the tokenize stage again") from None
    version = facts.get("schema") if isinstance(facts, dict) else None
    if version != SCHEMA:
        raise InputError(f"{path}: schema {version!r}, this version reads {SCHEMA}; run the tokenize stage again")
    return facts


class Shards:
    """The rows of one split, by number."""

    def __init__(self, folder: Path, split: str):
        """Raises InputError where shards are missing, unreadable or not what tokens.json says."""
        self.facts = read_facts(folder)
        self.seq_len: int = self.facts["seq_len"]
        self.vocab_size: int = self.facts["vocab_size"]
        self.rows: int = self.facts["rows"].get(split, 0)
        self._shards = [_open(path, self.seq_len) for path in sorted(folder.glob(f"{split}-*.safetensors"))]
        sizes = [self._rows_of(shard) for shard in self._shards]
        self._ends = np.cumsum(sizes)
        if sum(sizes) != self.rows or self.rows == 0:
            raise InputError(
                f"{folder}: {sum(sizes)} rows of {split!r} in the shards, {self.rows} in {FACTS}; "
                "run the tokenize stage again"
            )
        self._epoch = self._mixed(folder, sizes) if split == "train" and "mix" in self.facts else None
        if self._epoch is not None:
            self.rows = len(self._epoch)

    def _mixed(self, folder: Path, sizes: list[int]) -> np.ndarray:
        """The rows of an epoch of several sources."""
        try:
            mix = self.facts["mix"]
            owners, slots, seed = mix["shards"], [int(n) for n in mix["slots"]], int(mix["seed"])
            if len(owners) != len(sizes) or sum(slots) > (mixing.LONGEST + 1) * self.rows:
                raise ValueError
            source = np.repeat(np.array(owners, dtype=np.int64), sizes)
            places = [np.flatnonzero(source == k) for k in range(len(slots))]
            if not all(0 < len(rows) <= count for rows, count in zip(places, slots, strict=True)):
                raise ValueError
            return mixing.epoch(places, slots, seed)
        except (KeyError, TypeError, ValueError):
            raise InputError(f"{folder}: how its sources mix is damaged in {FACTS}; {_AGAIN}") from None

    def batch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The rows with these numbers (0..rows-1), in this order. Several sources number an epoch's rows: some are rows
        of the shards more than once.
        """
        places = [self._place(int(i if self._epoch is None else self._epoch[int(i)])) for i in indices]
        tokens, targets, weights, reset = (
            np.stack([self._shards[shard].get_slice(name)[row] for shard, row in places]) for name in _DTYPES
        )
        return Batch(tokens.astype(np.int32), targets.astype(np.int32), weights.astype(np.float32), reset)

    def _place(self, row: int) -> tuple[int, int]:
        """Which shard holds a row, and where in it."""
        if not 0 <= row < int(self._ends[-1]):
            raise IndexError(f"row {row} of {self.rows}")
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return shard, row - (int(self._ends[shard - 1]) if shard else 0)

    def _rows_of(self, shard: Any) -> int:
        return int(shard.get_slice("tokens").get_shape()[0])


def _open(path: Path, seq_len: int) -> Any:
    def check(header: headers.Header) -> None:
        found = {name: (entry.dtype, entry.shape) for name, entry in header.items()}
        rows = next(iter(header.values())).shape[:1] if header else ()
        wanted = {name: (f"U{8 * np.dtype(dtype).itemsize}", (*rows, seq_len)) for name, dtype in _DTYPES.items()}
        if found != wanted:
            raise InputError(f"{path}: not rows of {seq_len} tokens as {FACTS} says; {_AGAIN}")

    with headers.checked(path, check, _AGAIN) as (same, _):
        return safe_open(same, framework="numpy")


def indices(first: int, count: int, rows: int, seed: int) -> np.ndarray:
    """Row numbers of the samples first..first+count-1 of an endless sequence of seeded permutations of 0..rows-1.

    A sample's row depends on its number and the seed alone, so that a resumed run sees the same data.
    """
    samples = np.arange(first, first + count)
    return np.array([_permutation(int(s) // rows, rows, seed)[int(s) % rows] for s in samples], dtype=np.int64)


@lru_cache(maxsize=4)
def _permutation(epoch: int, rows: int, seed: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, epoch])).permutation(rows)
