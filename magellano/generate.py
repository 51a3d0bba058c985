"""Generation as a recurrence: the model's state is constant in size, so each token costs the same whatever came before.

Same seed, same tokens. How a token is chosen: magellano/sampling.py.
Shapes: B sequences, T time, D d_model, V vocabulary, P >= B.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from magellano.backend import mx
from magellano.decode import State, flat, folded
from magellano.errors import InputError
from magellano.model import MagellanoLM
from magellano.ops import launch
from magellano.sampling import Sampling, also, choose, following, seen

PROMPT_CHUNK, GPU_PROMPT_CHUNK = 256, 2048  # tokens of a prompt whose activations exist at once


@dataclass(frozen=True)
class Context:
    """What a model has read of one document: its tokens from the end-of-text that starts it, the state after them, and
    the logits [1, V] of what comes next. Constant in size but for the tokens; it is a value, and may be continued more
    than once.
    """

    tokens: tuple[int, ...]
    state: State
    logits_BV: mx.array

    def extended(self, model: MagellanoLM, tokens: Sequence[int]) -> "Context":
        """The context after `tokens` more."""
        if not tokens:
            return self
        logits_BV, state = read([tokens], model, self.state)
        return Context((*self.tokens, *tokens), state, logits_BV)


def begin(model: MagellanoLM, end_of_text: int, prompt: Sequence[int] = ()) -> Context:
    """The context of a new document: it starts with end-of-text, as in training, and goes on with `prompt`."""
    logits_BV, state = read([[end_of_text, *prompt]], model)
    return Context((end_of_text, *prompt), state, logits_BV)


def generate(
    model: MagellanoLM, prompt: Sequence[int], end_of_text: int, max_tokens: int, sampling: Sampling | None = None
) -> Iterator[int]:
    """Tokens that continue `prompt`, one by one as they are made, up to `max_tokens` or end-of-text (not yielded).

    Raises InputError for max_tokens below 1.
    """
    _check(max_tokens)
    yield from continued(model, begin(model, end_of_text, prompt), end_of_text, max_tokens, sampling)


def continued(
    model: MagellanoLM, context: Context, end_of_text: int, max_tokens: int, sampling: Sampling | None = None
) -> Iterator[int]:
    """The same from where `context` stands."""
    for (token,) in together(model, [context], end_of_text, max_tokens, sampling):
        assert token is not None
        yield token


def together(
    model: MagellanoLM,
    contexts: Sequence[Context],
    end_of_text: int,
    max_tokens: int,
    sampling: Sampling | None = None,
    number: int = 0,
    closed: Callable[[int], bool] = lambda n: False,
) -> Iterator[list[int | None]]:
    """What continues each of `contexts`, in lock-step: a token of each a time, None for those that have ended, by
    end-of-text or because `closed(n)` says so. Ends with the last of them. Sequence n draws with seed + number + n.
    """
    _check(max_tokens)
    stream, open_B = Stream(model, sampling or Sampling()), [True] * len(contexts)
    before = [[t for t in context.tokens if t != end_of_text] for context in contexts]
    now = stream.start(*_stacked(contexts), before, number)
    for made in range(1, max_tokens + 1):
        last = made == max_tokens
        # A GPU makes the next token while the host waits for this one; on a CPU that would only cost a step too many.
        ahead = None if last or not stream.ahead else stream.next(now)
        tokens = now.tokens(len(contexts))
        open_B = [o and token != end_of_text for o, token in zip(open_B, tokens, strict=True)]
        if not any(open_B):
            return
        yield [token if o else None for o, token in zip(open_B, tokens, strict=True)]
        open_B = [o and not closed(n) for n, o in enumerate(open_B)]
        if not any(open_B):
            return
        if not last:
            now = ahead or stream.next(now)


def _check(max_tokens: int) -> None:
    if max_tokens < 1:
        raise InputError(f"max_tokens {max_tokens} is less than 1")


def _stacked(contexts: Sequence[Context]) -> tuple[mx.array, State]:
    """The logits and the state of several contexts as of one batch."""
    arrays = [mx.concatenate(list(each)) for each in zip(*(flat(c.state) for c in contexts), strict=True)]
    return mx.concatenate([c.logits_BV for c in contexts]), folded(arrays, contexts[0].state)


@dataclass(frozen=True)
class Made:
    """What a step leaves behind, on the device: the tokens chosen, one a sequence and maybe more behind, the state
    after what came before them, the keys of the next choice, and the tokens had so far where they are penalised.
    """

    token_P: mx.array
    state: State
    key_B2: mx.array
    seen_BV: mx.array | None = None

    def token(self) -> int:
        """The first sequence's, waited for."""
        return self.tokens(1)[0]

    def tokens(self, batch: int) -> list[int]:
        """The first `batch` sequences', waited for."""
        return np.array(self.token_P)[:batch].tolist()

    def had(self) -> list[mx.array]:
        return [] if self.seen_BV is None else [self.seen_BV]


class Stream:
    """Tokens of a few sequences in lock-step. On a GPU a token is one compiled call, which needs nothing of the host:
    the choice included, keys derived from one another there.
    """

    def __init__(self, model: MagellanoLM, sampling: Sampling):
        self.model, self.sampling, self.ahead = model, sampling, launch.gpu_geometry()
        self.decoder = model.decoder()
        self._compiled: dict[int, Callable[..., list[mx.array]]] = {}

    def start(
        self, logits_BV: mx.array, state: State, before: Sequence[Sequence[int]] | None = None, number: int = 0
    ) -> Made:
        """The first choice, from the logits after the prompts. `before`: the tokens of each that a repetition penalty
        applies to. `number`: of the first sequence, among all that share the seed.
        """
        batch, vocabulary = logits_BV.shape
        had_BV = seen(before or [[]] * batch, vocabulary) if self.sampling.penalizes else None
        return self._launched(Made(*self._choose(logits_BV, self.sampling.keys(batch, number), state, had_BV)))

    def next(self, made: Made) -> Made:
        """The tokens after `made`, under way."""
        state, batch = made.state, _sequences(made.state)
        if not self.ahead:
            return Made(*self._step(made.token_P[:batch], made.key_B2, state, made.seen_BV))
        if batch not in self._compiled:
            like = [None if layer is None else True for layer in state]  # and not the state, which would stay

            def call(token_P: mx.array, key_B2: mx.array, had: list[mx.array], *arrays: mx.array) -> list[mx.array]:
                after = Made(*self._step(token_P[:batch], key_B2, folded(arrays, like), had[0] if had else None))
                return [after.token_P, after.key_B2, *after.had(), *flat(after.state)]

            self._compiled[batch] = mx.compile(call)
        token_P, key_B2, *arrays = self._compiled[batch](made.token_P, made.key_B2, made.had(), *flat(state))
        had_BV = arrays.pop(0) if made.seen_BV is not None else None
        return self._launched(Made(token_P, folded(arrays, state), key_B2, had_BV))

    def _launched(self, made: Made) -> Made:
        mx.async_eval(made.token_P, made.key_B2, made.had(), flat(made.state))
        return made

    def _step(
        self, token_B: mx.array, key_B2: mx.array, state: State, had_BV: mx.array | None
    ) -> tuple[mx.array, State, mx.array, mx.array | None]:
        if self.decoder.serves(token_B.size):
            logits_BV, state = self.decoder(token_B, state)
        else:
            h_B1D, state = self.model.advance(token_B[:, None], state)
            logits_BV = self.model.logits(h_B1D.squeeze(1))
        return self._choose(logits_BV, key_B2, state, had_BV)

    def _choose(
        self, logits_BV: mx.array, key_B2: mx.array, state: State, had_BV: mx.array | None
    ) -> tuple[mx.array, State, mx.array, mx.array | None]:
        """The fields of `Made`: the chosen tokens, the state as it is, the next keys, the tokens had with these."""
        now_B2 = key_B2
        if self.sampling.temperature > 0:
            key_B2, now_B2 = following(key_B2)
        token_B = choose(logits_BV, self.sampling, now_B2, had_BV)
        had_BV = None if had_BV is None else also(had_BV, token_B)
        if self.ahead and token_B.size < 4:  # arrays of 8 bytes and fewer lie where host and device fight over them
            token_B = mx.broadcast_to(token_B, (4, token_B.size)).reshape(-1)
        return token_B, state, key_B2, had_BV


def _sequences(state: State) -> int:
    """How many sequences a state is of."""
    return flat(state)[0].shape[0]


def prompt_chunk() -> int:
    """Tokens of a prompt whose activations exist at once."""
    return GPU_PROMPT_CHUNK if launch.gpu_geometry() else PROMPT_CHUNK


def read(prompts: Sequence[Sequence[int]], model: MagellanoLM, state: State | None = None) -> tuple[mx.array, State]:
    """Logits [B, V] after `prompts` of one length, and the state there; from `state`, by default the start. In chunks
    that carry the state, so that memory does not grow with the length; logits are made of the last position alone.
    """
    state = model.initial_state(len(prompts)) if state is None else state
    chunk, length = prompt_chunk(), len(prompts[0])
    for start in range(0, length, chunk):
        h_BTD, state = model.advance(mx.array([prompt[start : start + chunk] for prompt in prompts]), state)
        mx.eval(flat(state))
    return model.logits(h_BTD[:, -1]), state
