"""Run by test_resume_gpu.py: one training in this process, to its end or to the step at which it is to get a signal.

    python resume_gpu_runner.py WORK TOKENS SHAPE CONFIG [SIGNAL STEP]

The signal comes when the step's metrics are written and its checkpoint, if it has one, is not. Once at the end, the
adapter and the run's facts lie in WORK.
"""

import json
import os
import signal
import sys
from pathlib import Path

from magellano import lora
from magellano.errors import Stopped
from magellano.profile import ModelConfig, TrainConfig
from magellano.trainer import run_to_end
from tests.training import ADAPTERS, CONFIG, SMALL, adapter_trainer

# Large: what a GPU does otherwise has its place. Rows of whole NF4 blocks, experts with rooms that grow as loads do,
# time in segments, logits in chunks.
SHAPES = {
    "small": SMALL,
    "large": ModelConfig(
        d_model=128, n_layers=4, n_experts=8, d_ff=128, d_state=16, dt_rank=64, vocab_size=1000, moe_every=2
    ),
}
SEQ_LEN = {"small": 16, "large": 512}


def main() -> int:
    work, tokens, shape, config, *end = sys.argv[1:]
    settings = TrainConfig(**(CONFIG.model_dump() | json.loads(config)))
    trainer = adapter_trainer(Path(tokens), settings, shape=SHAPES[shape])

    def progress(done: int, total: int, **facts: float | str) -> None:
        if end and done == int(end[1]):
            os.kill(os.getpid(), signal.Signals[end[0]])

    try:
        facts = run_to_end(trainer, Path(work), progress)
    except Stopped as e:
        return int(e.exit_code)
    lora.save(Path(work), SHAPES[shape], ADAPTERS, trainer.tensors())
    facts["loads"] = trainer.backprop.loads  # what a GPU's rooms are made for
    (Path(work) / "facts.json").write_text(json.dumps(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
