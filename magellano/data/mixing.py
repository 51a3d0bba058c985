"""Several data sets in the proportions of their weights.

A weight is a share of the rows of an epoch, so nearly of its tokens. An epoch is as long as it takes to see every row
of every source: the source with most rows for its weight is seen once, the others are repeated; none is left out.
"""

from collections.abc import Sequence

import numpy as np

from magellano.errors import InputError

LONGEST = 100  # an epoch, in multiples of all rows


def slots(rows: Sequence[int], weights: Sequence[float], names: Sequence[str]) -> list[int]:
    """How many rows of an epoch each source has, at least as many as it has rows. InputError where a source has none,
    or the weights ask for more repetitions than make sense.
    """
    if empty := [name for name, count in zip(names, rows, strict=True) if count == 0]:
        raise InputError(f"data.sources: {empty[0]}: no row of it is left to train on; drop it or give it more rows")
    shares = np.array(weights, dtype=np.float64) / sum(weights)
    epoch = max(count / share for count, share in zip(rows, shares, strict=True))
    if epoch > LONGEST * sum(rows):
        raise InputError(
            f"data.sources: with these weights an epoch is {epoch / sum(rows):,.0f} times as long as the data (at most "
            f"{LONGEST}); bring them nearer to the sources' sizes"
        )
    return [max(count, round(epoch * share)) for count, share in zip(rows, shares, strict=True)]


def epoch(places: Sequence[np.ndarray], slots: Sequence[int], seed: int) -> np.ndarray:
    """The rows of an epoch, int64 [sum of slots]: `places[k]` are the rows of source k. What does not come out even is
    drawn by the seed.
    """
    made = []
    for source, (rows, count) in enumerate(zip(places, slots, strict=True)):
        whole, rest = divmod(count, len(rows))
        drawn = np.random.Generator(np.random.PCG64([seed, source])).permutation(rows)[:rest]
        made += [np.tile(rows, whole), drawn]
    return np.concatenate(made).astype(np.int64)
