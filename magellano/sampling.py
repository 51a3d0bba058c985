"""How the next token is chosen from its logits: greedy, temperature, top-k, top-p (nucleus: Holtzman et al. 2019, arXiv
1904.09751), min-p (Nguyen et al. 2024, arXiv 2407.01082), repetition penalty (Keskar et al. 2019, arXiv 1909.05858).

Shapes: B sequences, V vocabulary.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from magellano.backend import mx
from magellano.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 leave all tokens in, a
    repetition_penalty of 1 changes nothing. The order is: penalty, temperature, top-k, top-p, min-p.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise InputError(
                f"temperature {self.temperature} is not 0 or more; 0 is greedy, 1 the model's distribution"
            )
        if self.top_k < 0:
            raise InputError(f"top_k {self.top_k} is negative; 0 leaves all tokens in")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p} is not in (0, 1]; 1 leaves all tokens in")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p {self.min_p} is not in [0, 1]; 0 leaves all tokens in")
        if not 0 < self.repetition_penalty < math.inf:
            raise InputError(
                f"repetition_penalty {self.repetition_penalty} is not above 0; 1 changes nothing, 1.1 a bit"
            )
        if not 0 <= self.seed < 1 << 63:
            raise InputError(f"seed {self.seed} is not in 0 .. 2^63-1")

    @property
    def penalizes(self) -> bool:
        return self.repetition_penalty != 1

    def keys(self, batch: int, number: int = 0) -> mx.array:
        """Where the randomness of `batch` sequences starts, uint32 [B, 2]: that of sequence n is seed + number + n's,
        so that it does not depend on which others it runs beside.
        """
        return mx.stack([mx.random.key(self.seed + number + n) for n in range(batch)])


def seen(tokens: Sequence[Sequence[int]], vocabulary: int) -> mx.array:
    """Which tokens each sequence has had, bool [B, V]."""
    had_BV = np.zeros((len(tokens), vocabulary), dtype=np.bool_)
    for had_V, row in zip(had_BV, tokens, strict=True):
        had_V[list(row)] = True
    return mx.array(had_BV)


def also(seen_BV: mx.array, token_B: mx.array) -> mx.array:
    """`seen` with one token more a sequence."""
    return seen_BV | (mx.arange(seen_BV.shape[1]) == token_B[:, None])


def choose(logits: mx.array, sampling: Sampling, key: mx.array, seen: mx.array | None = None) -> mx.array:
    """A token id (int32) from each row of logits [.., V]. key: one for all [2], or one a row [B, 2] of [B, V]. seen:
    bool as the logits, where the repetition penalty applies.
    """
    logits = logits.astype(mx.float32)
    if seen is not None and sampling.penalizes:
        p = sampling.repetition_penalty
        logits = mx.where(seen, mx.where(logits > 0, logits / p, logits * p), logits)
    if sampling.temperature == 0:
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = _top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = _top_p(logits, sampling.top_p)
    if sampling.min_p > 0:
        least = logits.max(axis=-1, keepdims=True) + math.log(sampling.min_p)
        logits = mx.where(logits >= least, logits, -mx.inf)
    if key.ndim == 1:
        return mx.random.categorical(logits, key=key).astype(mx.int32)
    noise_BV = mx.vmap(lambda one: mx.random.gumbel(logits.shape[-1:], key=one))(key)
    return mx.argmax(logits + noise_BV, axis=-1).astype(mx.int32)


def following(keys_B2: mx.array) -> tuple[mx.array, mx.array]:
    """The keys of the choices after this one, and those of this one."""
    split = mx.vmap(lambda one: mx.random.split(one))(keys_B2)
    return split[:, 0], split[:, 1]


def _top_k(logits: mx.array, k: int) -> mx.array:
    keep = mx.argpartition(-logits, kth=k - 1, axis=-1)[..., :k]
    kept = mx.take_along_axis(logits, keep, axis=-1)
    return mx.put_along_axis(mx.full(logits.shape, -mx.inf), keep, kept, axis=-1)


def _top_p(logits: mx.array, p: float) -> mx.array:
    """Keeps the likeliest tokens up to the first at which their probabilities reach p: at least one."""
    order = mx.argsort(-logits, axis=-1)
    in_order = mx.take_along_axis(logits, order, axis=-1)
    before = mx.cumsum(mx.softmax(in_order, axis=-1), axis=-1, inclusive=False)
    return mx.put_along_axis(logits, order, mx.where(before < p, in_order, -mx.inf), axis=-1)
