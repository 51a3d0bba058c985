"""A token of one stream on a CUDA GPU by how many layers are one launch: none (each kernel by itself), one, three, all;
whether logits and states agree to the bit; by the clock and on the device alone.

    python benchmarks/gpu_decode.py [PROFILE] [TOKENS]
"""

import sys
import time
from functools import partial

import numpy as np

from magellano.backend import mx, on_gpu
from magellano.benchmark import machine, synthetic
from magellano.decode import Decoder, State, _layers, flat, folded
from magellano.generate import Made, Sampling, Stream, read
from magellano.model import MagellanoLM
from magellano.ops.chain import Chain
from magellano.profile import load_profile

WAYS = {"kernel by kernel": 0, "a launch a layer": 1, "a launch for three": 3, "a launch for all": 1 << 10}


class Grouped(Decoder):
    """A launch for each so many layers; 0: for each kernel."""

    def __init__(self, model: MagellanoLM, together: int):
        super().__init__(model, chained=together > 0)
        self.together, self.found = together, dict[int, Chain]()  # by their first layer

    def _run(self, like: State, arrays: list[mx.array]) -> list[mx.array]:
        if self.single is not None:
            return super()._run(like, arrays)
        h_BD, *rest = arrays
        state, new = folded(rest, like), []
        for first in range(0, len(self.steps), self.together):
            some = slice(first, first + self.together)
            given = [h_BD, *flat(state[some])]
            if first not in self.found:
                self.found[first] = Chain("layers", partial(_layers, self.steps[some], state[some]), given)
            h_BD, *after = self.found[first](*given)
            new += after
        return [h_BD, *new]


def after(model: MagellanoLM, together: int, token: mx.array, state: State, steps: int = 6) -> list[mx.array]:
    """Logits and state after the same tokens."""
    one = Grouped(model, together)
    for _ in range(steps):
        logits, state = one(token, state)
    mx.eval(logits, flat(state))
    return [logits, *flat(state)]


def timed(model: MagellanoLM, together: int, start: tuple[mx.array, State], tokens: int) -> tuple[float, float]:
    """Seconds a token, and those of the device alone."""
    stream = Stream(model, Sampling())
    stream.decoder = Grouped(model, together)
    made = stream.start(*start)

    def go(made: Made, steps: int) -> Made:
        for _ in range(steps):
            following = stream.next(made)
            made.token()
            made = following
        made.token()
        return made

    made = go(made, 10)
    started = time.perf_counter()
    made = go(made, tokens)
    seconds = (time.perf_counter() - started) / tokens
    return seconds, machine.on_device(lambda: [stream.next(made).token_P])


def main() -> None:
    if not on_gpu() or not mx.cuda.is_available():
        sys.exit("gpu_decode.py: needs a CUDA GPU")
    profile = load_profile(sys.argv[1] if len(sys.argv) > 1 else "production3b")
    tokens = int(sys.argv[2]) if len(sys.argv) > 2 else 200
    model, copy = synthetic.model(profile), machine.copy_bandwidth()
    moved = sum(model.decoder().reads().values())
    prompt = np.random.default_rng(0).integers(0, profile.model.vocab_size, (1, 100)).tolist()
    start = read(prompt, model)
    wanted = after(model, 0, mx.argmax(start[0], axis=-1), start[1])
    print(f"{profile.name} on {machine.where()['device']}, copies {copy / 1e9:.0f} GB/s, {moved / 1e9:.2f} GB a token")
    for way, together in WAYS.items():
        found = after(model, together, mx.argmax(start[0], axis=-1), start[1])
        same = all(mx.array_equal(a, b).item() for a, b in zip(found, wanted, strict=True))
        for _ in range(2):
            seconds, alone = timed(model, together, start, tokens)
            print(
                f"{way:20} {seconds * 1e3:6.2f} ms, device {alone * 1e3:5.2f} ms, {1 / seconds:4.0f} tokens/s, "
                f"{moved / seconds / copy:4.0%} of the copies, same bits: {'yes' if same else 'NO'}"
            )


if __name__ == "__main__":
    main()
