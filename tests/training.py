"""A training that takes a moment: rows of random tokens, a tiny model in NF4 with adapters. Shared by several tests."""

import hashlib
from pathlib import Path

import numpy as np

from magellano import lora, nf4
from magellano.data import shards
from magellano.layout import ParamSpec
from magellano.linear import Weight
from magellano.model import MagellanoLM, seeded
from magellano.profile import LoraConfig, LossConfig, ModelConfig, TrainConfig
from magellano.trainer import Trainer

SMALL = ModelConfig(d_model=32, n_layers=4, n_experts=3, d_ff=24, d_state=4, dt_rank=4, vocab_size=300)
ADAPTERS = LoraConfig(rank=4)
CONFIG = TrainConfig(steps=6, batch=2, lr=1e-2, warmup=2, checkpoint_every=2, log_every=1, compute="float32")


def silent(done: int, total: int, **facts: float | str) -> None:
    pass


def make_tokens(folder: Path, seq_len: int = 16, vocab_size: int = SMALL.vocab_size) -> Path:
    """A tokens folder with documents of uneven length and masks."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, rows in (("train", 13), ("held_out", 3)):
        ids = rng.integers(0, 40, (rows, seq_len + 1)).astype(np.uint16)
        reset = (rng.random((rows, seq_len)) < 0.15).astype(np.uint8)
        reset[:, 0] = 1
        shards.write_split(
            folder,
            split,
            [shards.Rows(ids[:, :-1], ids[:, 1:], (rng.random((rows, seq_len)) < 0.7).astype(np.uint8), reset)],
        )
    shards.write_facts(folder, vocab_size=vocab_size, seq_len=seq_len, rows={"train": 13, "held_out": 3})
    return folder


def adapter_trainer(
    tokens: Path,
    config: TrainConfig = CONFIG,
    loss: LossConfig | None = None,
    adapters: LoraConfig = ADAPTERS,
    shape: ModelConfig = SMALL,
) -> Trainer:
    def source(spec: ParamSpec) -> Weight:
        w = seeded(3)(spec)
        if spec.target is None:
            return w
        return nf4.NF4Stack.of([nf4.quantize(x) for x in w]) if w.ndim == 3 else nf4.quantize(w)

    model = MagellanoLM(shape, source)
    lora.attach(model, adapters, lora.start(shape, adapters))
    return Trainer(model, config, tokens, loss, plus=adapters.plus)


def digest(trainer: Trainer) -> str:
    """SHA-256 of what was trained."""
    h = hashlib.sha256()
    for name, value in sorted(trainer.tensors().items()):
        h.update(name.encode() + np.array(value).tobytes())
    return h.hexdigest()
