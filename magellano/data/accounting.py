"""The books of a tokenized data set. They balance exactly, or `check` fails: nothing is lost in silence."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class Accounting:
    """Counts of rows and of tokens. A token here is a target: a document of n has n + 1, with its end-of-text."""

    rows_read: int = 0
    used: int = 0
    duplicates: int = 0
    rejected: Counter[str] = field(default_factory=Counter)  # by reason
    tokens_in: int = 0
    trained: int = 0  # targets that count, of the training split
    context: int = 0  # targets masked out of the loss (prompts), of the training split
    held_out: int = 0  # targets of the held-out split, masked ones too
    dropped: int = 0  # targets in pieces of long documents in which nothing counts
    held_out_counted: int = 0
    held_out_bytes: int = 0  # bytes that the counted held-out targets spell, for bits per byte
    documents: Counter[str] = field(default_factory=Counter)  # by split
    split: int = 0  # documents longer than a row, cut in pieces
    padding: int = 0  # positions that hold no token

    toon_records: int = 0  # JSON records of prompts that became TOON, with their tokens before and after
    toon_kept: int = 0  # that stayed JSON, for TOON would not have given them back equal
    json_tokens: int = 0
    toon_tokens: int = 0

    def check(self) -> None:
        """AssertionError where a row or a token is unaccounted for."""
        rows = self.used + self.duplicates + self.rejected.total()
        assert self.rows_read == rows, f"rows: {self.rows_read} read, {rows} accounted for"
        tokens = self.trained + self.context + self.held_out + self.dropped
        assert self.tokens_in == tokens, f"tokens: {self.tokens_in} in, {tokens} accounted for"
        assert self.used == self.documents.total(), f"rows used: {self.used}, documents: {self.documents.total()}"

    @classmethod
    def total(cls, parts: "Sequence[Accounting]") -> "Accounting":
        """The books of several sources as one."""
        made = cls()
        for part in parts:
            for f in fields(cls):
                setattr(made, f.name, getattr(made, f.name) + getattr(part, f.name))
        return made

    def to_dict(self) -> dict[str, Any]:
        """As JSON; reasons and splits in alphabetical order."""
        counts = {"rejected": dict(sorted(self.rejected.items())), "documents": dict(sorted(self.documents.items()))}
        return {**asdict(self), **counts}
