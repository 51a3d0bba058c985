"""Generation as a recurrence: the model's state is constant in size, so each token costs the same whatever came before.

Greedy, temperature, top-k, top-p (nucleus: Holtzman et al. 2019, arXiv 1904.09751). Same seed, same tokens.
Shapes: V vocabulary, T time.
"""

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from magellano.backend import mx
from magellano.errors import InputError
from magellano.mamba import MambaState
from magellano.model import MagellanoLM

PROMPT_CHUNK = 256  # tokens of a prompt whose activations exist at once


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. Temperature 0 is greedy; top_k 0 and top_p 1 leave all tokens in."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.temperature < 0:
            raise InputError(f"temperature {self.temperature} is negative; 0 is greedy, 1 the model's own distribution")
        if self.top_k < 0:
            raise InputError(f"top_k {self.top_k} is negative; 0 leaves all tokens in")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p {self.top_p} is not in (0, 1]; 1 leaves all tokens in")


def generate(
    model: MagellanoLM, prompt: Sequence[int], end_of_text: int, max_tokens: int, sampling: Sampling | None = None
) -> Iterator[int]:
    """Tokens that continue `prompt`, one by one as they are made, up to `max_tokens` or end-of-text (not yielded).

    A document starts with end-of-text, as in training, so that is fed first. Raises InputError for max_tokens below 1.
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens {max_tokens} is less than 1")
    sampling = sampling or Sampling()
    key = mx.random.key(sampling.seed)
    logits_V, state = _read([end_of_text, *prompt], model)
    for made in range(1, max_tokens + 1):
        key, now = mx.random.split(key)
        token = choose(logits_V, sampling, now).item()
        assert isinstance(token, int)
        if token == end_of_text:
            return
        yield token
        if made < max_tokens:
            logits_BTV, state = model.step(mx.array([[token]]), state)
            logits_V = logits_BTV[0, -1]


def _read(tokens: list[int], model: MagellanoLM) -> tuple[mx.array, list[MambaState | None]]:
    """Logits [V] after `tokens` and the state there. Only the last chunk's logits are ever evaluated."""
    state = model.initial_state(1)
    for start in range(0, len(tokens), PROMPT_CHUNK):
        logits_BTV, state = model.step(mx.array([tokens[start : start + PROMPT_CHUNK]]), state)
        mx.eval(state)
    return logits_BTV[0, -1], state


def choose(logits_V: mx.array, sampling: Sampling, key: mx.array) -> mx.array:
    """One token id (int32 scalar) from logits [V]."""
    logits_V = logits_V.astype(mx.float32)
    if sampling.temperature == 0:
        return mx.argmax(logits_V).astype(mx.int32)
    logits_V = logits_V / sampling.temperature
    if 0 < sampling.top_k < logits_V.size:
        logits_V = _top_k(logits_V, sampling.top_k)
    if sampling.top_p < 1:
        logits_V = _top_p(logits_V, sampling.top_p)
    return mx.random.categorical(logits_V, key=key).astype(mx.int32)


def _top_k(logits_V: mx.array, k: int) -> mx.array:
    keep_k = mx.argpartition(-logits_V, kth=k - 1)[:k]
    return mx.put_along_axis(mx.full(logits_V.shape, -mx.inf), keep_k, logits_V[keep_k], axis=0)


def _top_p(logits_V: mx.array, p: float) -> mx.array:
    """Keeps the likeliest tokens up to the first at which their probabilities reach p: at least one."""
    order_V = mx.argsort(-logits_V)
    sorted_V = mx.softmax(logits_V[order_V])
    before_V = mx.cumsum(sorted_V, inclusive=False)
    kept_V = mx.where(before_V < p, logits_V[order_V], -mx.inf)
    return mx.put_along_axis(logits_V, order_V, kept_V, axis=0)


def text(tokens: Iterator[int], to_bytes: Callable[[Sequence[int]], bytes]) -> Iterator[str]:
    """The tokens' text as it grows. A character that spans tokens is held back until it is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if piece := decoder.decode(to_bytes([token])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest
