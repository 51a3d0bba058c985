"""GPT-2's byte-level BPE (Radford et al. 2019) in any size, from the ranks in this package and never from the network.

A prefix of the ranks is itself a valid byte-level BPE: a vocabulary of N is the first N-1 ranks and end-of-text as id
N-1. N = 50,257 gives GPT-2's own ids.
"""

import hashlib
import json
import os
from base64 import b64decode
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from magellano import files
from magellano.errors import InputError

if TYPE_CHECKING:
    from tiktoken import Encoding

RANKS = Path(__file__).resolve().parent / "data" / "gpt2.tiktoken"
# The digest that tiktoken pins for r50k_base.
RANKS_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
SMALLEST, LARGEST = 257, 50257  # the 256 bytes, or all ranks, and end-of-text
FILE, SCHEMA = "tokenizer.json", 1
_KIND = "gpt2-bpe-prefix"
# GPT-2's splitting pattern, in the possessive form that tiktoken uses for it (same splits, faster).
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


class Tokenizer:
    """Text to token ids and back. Cheap to make: the tables of a size are built once per process."""

    def __init__(self, vocab_size: int = LARGEST):
        """Raises InputError for a size outside 257..50257 or a damaged ranks file."""
        if not SMALLEST <= vocab_size <= LARGEST:
            raise InputError(
                f"vocab_size {vocab_size}: the tokenizer has {SMALLEST} to {LARGEST} tokens; choose one of those"
            )
        self.vocab_size = vocab_size
        self.end_of_text = vocab_size - 1
        self._encoding = _encoding(vocab_size)

    def encode(self, text: str) -> list[int]:
        """Ids of `text`. Nothing in it is special: `<|endoftext|>` is encoded as the characters it is made of."""
        return self._encoding.encode_ordinary(text)

    def encode_many(self, texts: Sequence[str], threads: int = 2) -> list[list[int]]:
        """`encode` for each text, on `threads` threads."""
        return self._encoding.encode_ordinary_batch(list(texts), num_threads=threads)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`; end-of-text is left out and bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes that `ids` spell; end-of-text spells none. Raises InputError for an id outside the vocabulary."""
        spelled = [int(i) for i in ids if i != self.end_of_text]
        if wrong := next((i for i in spelled if not 0 <= i < self.vocab_size), None):
            raise InputError(f"token id {wrong} is outside the vocabulary of {self.vocab_size}")
        return self._encoding.decode_bytes(spelled)

    def bytes_per_token(self) -> np.ndarray:
        """[V] int32: how many bytes each token spells; end-of-text spells 0."""
        return np.array([len(token) for token in ranked(self.vocab_size - 1)] + [0], dtype=np.int32)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` into `folder`: which tokenizer this is; its tables ship with the package."""
        facts = {"schema": SCHEMA, "kind": _KIND, "vocab_size": self.vocab_size, "ranks_sha256": RANKS_SHA256}
        (folder / FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """The tokenizer that `save` described in `folder`. Raises InputError where it is missing or another kind."""
        path = folder / FILE
        if not os.path.lexists(path):
            raise InputError(f"{path}: no tokenizer here; give a folder that a stage has written")
        facts = files.read_json(path, "write the folder again")
        from magellano.hf_tokenizer import Foreign  # which stands on this module

        if facts.get("kind") == Foreign.KIND and facts.get("schema") == SCHEMA:
            return Foreign.read(folder, facts)
        wanted = {"schema": SCHEMA, "kind": _KIND, "ranks_sha256": RANKS_SHA256}
        for key, value in wanted.items():
            found = facts.get(key)
            if found != value:
                told = f"{key} is {files.shown(found)}, this version reads {value!r}"
                raise InputError(f"{path}: {told}; use the version that wrote it")
        size = facts.get("vocab_size")
        if type(size) is not int:
            raise InputError(f"{path}: vocab_size is {files.shown(size)}, not a whole number; write the folder again")
        return cls(size)


def ours(folder: Path) -> bool:
    """Whether the tokenizer of a model folder, if it has one, is GPT-2's."""
    return not os.path.lexists(folder / FILE) or files.read_json(folder / FILE, "write it again").get("kind") == _KIND


@cache
def ranked(count: int = LARGEST - 1) -> tuple[bytes, ...]:
    """The first `count` tokens by rank. Raises InputError where the packaged file is not the one that was published."""
    if count < LARGEST - 1:
        return ranked()[:count]
    data = RANKS.read_bytes()
    if hashlib.sha256(data).hexdigest() != RANKS_SHA256:
        raise InputError(f"{RANKS}: damaged (its SHA-256 is not the published one); install magellano again")
    tokens = tuple(b64decode(line.split()[0]) for line in data.splitlines())
    assert len(tokens) == count, len(tokens)
    return tokens


@cache
def _encoding(vocab_size: int) -> "Encoding":
    import tiktoken

    ranks = {token: rank for rank, token in enumerate(ranked(vocab_size - 1))}
    special = {"<|endoftext|>": vocab_size - 1}
    return tiktoken.Encoding(f"gpt2-{vocab_size}", pat_str=_PATTERN, mergeable_ranks=ranks, special_tokens=special)
