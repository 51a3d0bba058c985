"""Which rows were there before, for data sets larger than memory: their digests of 16 bytes in one flat table.

It is from 35 to 70 % full, so that a different row takes 23 to 46 bytes, and three times as many while the table grows
into one of twice the size. Python's own set takes 120. Rows are duplicates where their digests are equal: two different
rows among a billion are so with a probability of 1e-21.
"""

SIZE, FULL = 16, 0.7
_FREE = bytes(SIZE)  # no digest that ever comes up


class Seen:
    """A set of digests that grows."""

    def __init__(self, slots: int = 1 << 12):
        """`slots`: a power of 2."""
        self._slots, self._count = slots, 0
        self._table = bytearray(SIZE * slots)

    def __len__(self) -> int:
        return self._count

    def add(self, digest: bytes) -> bool:
        """Whether `digest` is new; from now on it is not."""
        at = self._place(digest)
        if self._table[at : at + SIZE] == digest:
            return False
        self._table[at : at + SIZE] = digest
        self._count += 1
        if self._count > FULL * self._slots:
            self._grow()
        return True

    def _place(self, digest: bytes) -> int:
        """Where it stands, or else the free place for it: the first free one from that which its first bytes name."""
        table, mask = self._table, self._slots - 1
        slot = int.from_bytes(digest[:8], "little") & mask
        while table[SIZE * slot : SIZE * slot + SIZE] not in (digest, _FREE):
            slot = (slot + 1) & mask
        return SIZE * slot

    def _grow(self) -> None:
        old = self._table
        self._slots *= 2
        self._table = bytearray(SIZE * self._slots)
        for start in range(0, len(old), SIZE):
            digest = bytes(old[start : start + SIZE])
            if digest != _FREE:
                at = self._place(digest)
                self._table[at : at + SIZE] = digest
