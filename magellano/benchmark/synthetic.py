"""A profile's model and data without files: seeded initial weights, quantised as they are made, and random tokens. What
a step costs depends on shapes alone.
"""

from pathlib import Path

import numpy as np

from magellano import init, lora, nf4
from magellano.backend import compute_dtype, mx
from magellano.data import shards
from magellano.layout import ParamSpec
from magellano.linear import Weight
from magellano.model import MagellanoLM
from magellano.names import LoraTarget
from magellano.profile import Profile


def model(profile: Profile) -> MagellanoLM:
    """The base of `profile` in NF4 with its adapter at the start."""

    def source(spec: ParamSpec) -> Weight:
        seed = profile.base.seed
        if spec.target is None or (spec.target is LoraTarget.HEAD and not profile.quantize.embedding):
            weight = init.initial(spec, seed)
            mx.eval(weight)
            return weight
        if len(spec.shape) == 2:
            return _quantized(init.initial(spec, seed))
        return nf4.NF4Stack.of([_quantized(init.initial_expert(spec, seed, e)) for e in range(spec.shape[0])])

    made = MagellanoLM(profile.model, source, compute_dtype(profile.train.compute))
    lora.attach(made, profile.lora, lora.start(profile.model, profile.lora, lora.base_of_model(made)))
    mx.eval(made.parameters())
    mx.clear_cache()
    return made


def _quantized(weight: mx.array) -> nf4.NF4Tensor:
    made = nf4.quantize(weight)
    mx.eval(list(made.arrays().values()))
    return made


def tokens(folder: Path, profile: Profile) -> Path:
    """A tokens folder in `folder` with a few rows of random tokens, every target counted, one document a row."""
    T, vocabulary, rows = profile.data.seq_len, profile.model.vocab_size, 4 * profile.train.batch
    generator = np.random.default_rng(0)
    ids = generator.integers(0, vocabulary, (rows, T + 1)).astype(np.uint16)
    reset = np.zeros((rows, T), np.uint8)
    reset[:, 0] = 1
    made = shards.Rows(ids[:, :-1], ids[:, 1:], np.ones((rows, T), np.uint8), reset)
    for split in ("train", "held_out"):
        shards.write_split(folder, split, [made])
    shards.write_facts(folder, vocab_size=vocabulary, seq_len=T, rows={"train": rows, "held_out": rows})
    return folder
