"""Makes tests/golden/loss.json: losses of 30 training steps of a tiny model in float32, with all parameters and with
adapters alone.

Run it from a checkout whose numbers are trusted: `python tests/golden/make_loss.py > tests/golden/loss.json`. The file
in the repository was made by the version that took gradients through MLX's own graph of the whole model, so that what
was written by hand since then is held against it.
"""

import json
import tempfile
from pathlib import Path

import numpy as np

from magellano import lora, nf4
from magellano.data import shards
from magellano.layout import ParamSpec
from magellano.linear import Weight
from magellano.model import MagellanoLM, seeded
from magellano.profile import LoraConfig, ModelConfig, TrainConfig
from magellano.trainer import Trainer

MODEL = ModelConfig(d_model=64, n_layers=8, n_experts=4, d_ff=128, d_state=8, dt_rank=4, vocab_size=300)
STEPS = 30
TRAIN = TrainConfig(steps=STEPS, batch=4, lr=1e-3, warmup=4, weight_decay=0.1, compute="float32", loss_chunk=24)


def quantized(spec: ParamSpec) -> Weight:
    """The initial weights of seed 3, in NF4 where they are quantised."""
    w = seeded(3)(spec)
    if spec.target is None:
        return w
    each = [nf4.quantize(x) for x in w] if w.ndim == 3 else nf4.quantize(w)
    return nf4.NF4Stack.of(each) if w.ndim == 3 and hasattr(nf4, "NF4Stack") else each


def tokens(folder: Path) -> Path:
    """Rows of two kinds of counting, so that there is something to learn, with borders and masks."""
    rng = np.random.default_rng(0)
    first, by = rng.integers(0, 40, (32, 1)), rng.integers(1, 3, (32, 1))
    ids = ((first + by * np.arange(33)) % 50).astype(np.uint16)
    reset = (rng.random((32, 32)) < 0.05).astype(np.uint8)
    reset[:, 0] = 1
    rows = shards.Rows(ids[:, :-1], ids[:, 1:], (rng.random((32, 32)) < 0.8).astype(np.uint8), reset)
    for split in ("train", "held_out"):
        shards.write_split(folder, split, [rows])
    shards.write_facts(folder, vocab_size=300, seq_len=32, rows={"train": 32, "held_out": 32})
    return folder


def losses(adapter: bool) -> list[float]:
    """Nats a target token, step by step."""
    with tempfile.TemporaryDirectory() as folder:
        model = MagellanoLM(MODEL, quantized if adapter else seeded(3))
        if adapter:
            settings = LoraConfig(rank=4)
            lora.attach(model, settings, lora.start(MODEL, settings))
        trainer = Trainer(model, TRAIN, tokens(Path(folder)))
        return [trainer.one_step().loss for _ in range(STEPS)]


if __name__ == "__main__":
    print(json.dumps({"pretrain": losses(False), "fine-tune": losses(True)}, indent=1))
