"""Generation with a profile's model on seeded weights: prefill of a long prompt, one stream near the start and behind
that prompt, and several streams in lock-step. What a token must read, against the copy bandwidth of the same run.
"""

import time
from typing import Any

import numpy as np

from magellano import plan
from magellano.backend import mx, on_gpu
from magellano.benchmark import machine, synthetic
from magellano.decode import State, flat
from magellano.generate import Made, Sampling, Stream, prompt_chunk, read
from magellano.model import MagellanoLM
from magellano.profile import Profile

WARM_UP = 4  # tokens: kernels are compiled at first use
SHORT, LONG_GPU, LONG_CPU, LONG_SLOW = 100, 131_072, 4096, 512  # tokens of the prompts
_QUICK = 20_000_000  # parameters up to which a CPU reads the longer prompt


def run(profile: Profile, steps: int = 0) -> dict[str, Any]:
    """`steps` tokens are timed, by default as many as suit the machine. Memory in GiB: `active` holds the weights."""
    steps = steps or machine.pick(20, 200)
    copy = machine.copy_bandwidth()
    mx.clear_cache()
    model = synthetic.model(profile)
    decoder = model.decoder()
    parts = decoder.reads()
    planned = plan.fine_tune(profile, on_gpu())
    long = LONG_GPU if on_gpu() else LONG_CPU if planned.parameters <= _QUICK else LONG_SLOW
    streams = [_stream(model, profile, SHORT, 1, steps, copy, parts)]
    prefill, state = _prefill(model, profile, long)
    streams.append(_stream(model, profile, long, 1, steps, copy, parts, state))
    batches = [1, 4, 16, 64] if on_gpu() else [1, 4]
    return {
        **machine.where(),
        "profile": profile.name,
        "parameters": planned.parameters,
        "compute": str(model.compute).removeprefix("mlx.core."),
        "tokens_timed": steps,
        "layers": decoder.single or "one launch a token",
        "copy_gb_s": copy / 1e9,
        "tokens_per_s": streams[0]["tokens_per_s"],
        "tokens_per_s_after_the_long_prompt": streams[1]["tokens_per_s"],
        "bytes_a_token": sum(parts.values()),
        "share_of_copy_bandwidth": streams[0]["share_of_ceiling"],
        "prompt_tokens": long,
        **prefill,
        "bytes_a_token_by_part": parts,
        "one stream": streams,
        "streams in lock-step": [_stream(model, profile, SHORT, n, steps, copy, parts) for n in batches],
    }


def _prompts(profile: Profile, length: int, batch: int) -> list[list[int]]:
    made = np.random.default_rng(0).integers(0, profile.model.vocab_size, (batch, length))
    return [row.tolist() for row in made]


def _prefill(model: MagellanoLM, profile: Profile, length: int) -> tuple[dict[str, float], tuple[mx.array, State]]:
    """Reading a prompt: its speed, and MLX's peak beside what was there."""
    prompt = _prompts(profile, length, 1)
    mx.eval(read([prompt[0][: 2 * prompt_chunk()]], model)[0])  # both kernels' first use and MLX's cache
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    started = time.perf_counter()
    logits_BV, state = read(prompt, model)
    mx.eval(logits_BV)
    seconds = time.perf_counter() - started
    peak = (mx.get_peak_memory() - before) / (1 << 30)
    return {"prefill_tokens_per_s": length / seconds, "prefill_extra_gib": peak}, (logits_BV, state)


def _stream(
    model: MagellanoLM,
    profile: Profile,
    position: int,
    batch: int,
    steps: int,
    copy: float,
    parts: dict[str, int],
    after: tuple[mx.array, State] | None = None,
) -> dict[str, Any]:
    """Greedy tokens as `generate` makes them, read one step late. `after`: where to go on; else a random prompt is
    read. The ceiling is the time in which the bytes of a token of one stream are copied, whatever the batch.
    """
    stream = Stream(model, Sampling())
    made = stream.start(*(after or read(_prompts(profile, position, batch), model)))
    for _ in range(WARM_UP):
        made = _next(stream, made)
    mx.clear_cache()
    mx.reset_peak_memory()
    started = time.perf_counter()
    for _ in range(steps):
        made = _next(stream, made)
    made.token()
    seconds = (time.perf_counter() - started) / steps
    return {
        "batch": batch,
        "position": position,
        "ms_a_step": seconds * 1e3,
        "tokens_per_s": batch / seconds,
        "share_of_ceiling": sum(parts.values()) / seconds / copy,
        "state_mib": sum(a.nbytes for a in flat(made.state)) / (1 << 20),
        "active_gib": mx.get_active_memory() / (1 << 30),
        "peak_gib": mx.get_peak_memory() / (1 << 30),
    }


def _next(stream: Stream, made: Made) -> Made:
    following = stream.next(made)
    made.token()
    return following
