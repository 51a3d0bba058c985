"""Generation as a recurrence: the model's state is constant in size, so each token costs the same whatever came before.

Greedy, temperature, top-k, top-p (nucleus: Holtzman et al. 2019, arXiv 1904.09751). Same seed, same tokens.
Shapes: B sequences, T time, D d_model, V vocabulary, P >= B.
"""

import codecs
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from magellano.backend import mx
from magellano.decode import State, flat, folded
from magellano.errors import InputError
from magellano.model import MagellanoLM
from magellano.ops import launch

PROMPT_CHUNK, GPU_PROMPT_CHUNK = 256, 2048  # tokens of a prompt whose activations exist at once


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
    stream = Stream(model, sampling or Sampling())
    now = stream.start(*read([[end_of_text, *prompt]], model))
    for made in range(1, max_tokens + 1):
        last = made == max_tokens
        # A GPU makes the next token while the host waits for this one; on a CPU that would only cost a step too many.
        following = None if last or not stream.ahead else stream.next(now)
        token = now.token()
        if token == end_of_text:
            return
        yield token
        if not last:
            now = following or stream.next(now)


@dataclass(frozen=True)
class Made:
    """What a step leaves behind, on the device: the tokens chosen, one a sequence and maybe more behind, the state
    after what came before them, and the key of the next choice.
    """

    token_P: mx.array
    state: State
    key: mx.array

    def token(self) -> int:
        """The first sequence's, waited for."""
        return int(np.array(self.token_P)[0])


class Stream:
    """Tokens of a few sequences in lock-step. On a GPU a token is one compiled call, which needs nothing of the host:
    the choice included, keys derived from one another there.
    """

    def __init__(self, model: MagellanoLM, sampling: Sampling):
        self.model, self.sampling, self.ahead = model, sampling, launch.gpu_geometry()
        self.decoder = model.decoder()
        self._compiled: dict[int, Callable[..., list[mx.array]]] = {}

    def start(self, logits_BV: mx.array, state: State) -> Made:
        """The first choice, from the logits after the prompts."""
        token_P, key = self._choose(logits_BV, mx.random.key(self.sampling.seed))
        return self._launched(Made(token_P, state, key))

    def next(self, made: Made) -> Made:
        """The tokens after `made`, under way."""
        state, batch = made.state, _sequences(made.state)
        if not self.ahead:
            return Made(*self._step(made.token_P[:batch], made.key, state))
        if batch not in self._compiled:
            like = [None if layer is None else True for layer in state]  # and not the state, which would stay

            def call(token_P: mx.array, key: mx.array, *arrays: mx.array) -> list[mx.array]:
                token_P, after, key = self._step(token_P[:batch], key, folded(arrays, like))
                return [token_P, key, *flat(after)]

            self._compiled[batch] = mx.compile(call)
        token_P, key, *arrays = self._compiled[batch](made.token_P, made.key, *flat(state))
        return self._launched(Made(token_P, folded(arrays, state), key))

    def _launched(self, made: Made) -> Made:
        mx.async_eval(made.token_P, made.key, flat(made.state))
        return made

    def _step(self, token_B: mx.array, key: mx.array, state: State) -> tuple[mx.array, State, mx.array]:
        if self.decoder.serves(token_B.size):
            logits_BV, state = self.decoder(token_B, state)
        else:
            h_B1D, state = self.model.advance(token_B[:, None], state)
            logits_BV = self.model.logits(h_B1D.squeeze(1))
        token_P, key = self._choose(logits_BV, key)
        return token_P, state, key

    def _choose(self, logits_BV: mx.array, key: mx.array) -> tuple[mx.array, mx.array]:
        """The chosen tokens and the next key."""
        if self.sampling.temperature > 0:
            key, now = (half.reshape(-1) for half in mx.split(mx.random.split(key), 2))
        else:
            now = key
        token_B = choose(logits_BV, self.sampling, now)
        if self.ahead and token_B.size < 4:  # arrays of 8 bytes and fewer lie where host and device fight over them
            token_B = mx.broadcast_to(token_B, (4, token_B.size)).reshape(-1)
        return token_B, key


def _sequences(state: State) -> int:
    """How many sequences a state is of."""
    return flat(state)[0].shape[0]


def prompt_chunk() -> int:
    """Tokens of a prompt whose activations exist at once."""
    return GPU_PROMPT_CHUNK if launch.gpu_geometry() else PROMPT_CHUNK


def read(prompts: Sequence[Sequence[int]], model: MagellanoLM) -> tuple[mx.array, State]:
    """Logits [B, V] after `prompts` of one length, and the state there. In chunks that carry the state, so that memory
    does not grow with the length; logits are made of the last position alone.
    """
    state = model.initial_state(len(prompts))
    chunk, length = prompt_chunk(), len(prompts[0])
    for start in range(0, length, chunk):
        h_BTD, state = model.advance(mx.array([prompt[start : start + chunk] for prompt in prompts]), state)
        mx.eval(flat(state))
    return model.logits(h_BTD[:, -1]), state


def choose(logits: mx.array, sampling: Sampling, key: mx.array) -> mx.array:
    """A token id (int32) from each row of logits [.., V]."""
    logits = logits.astype(mx.float32)
    if sampling.temperature == 0:
        return mx.argmax(logits, axis=-1).astype(mx.int32)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        logits = _top_k(logits, sampling.top_k)
    if sampling.top_p < 1:
        logits = _top_p(logits, sampling.top_p)
    return mx.random.categorical(logits, key=key).astype(mx.int32)


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


def text(tokens: Iterator[int], to_bytes: Callable[[Sequence[int]], bytes]) -> Iterator[str]:
    """The tokens' text as it grows. A character that spans tokens is held back until it is whole."""
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for token in tokens:
        if piece := decoder.decode(to_bytes([token])):
            yield piece
    if rest := decoder.decode(b"", final=True):
        yield rest
