"""train: tokens, quantised base, starting adapter -> the trained adapter with its optimiser, position and metrics."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from magellano import loader, lora, memory, tensorboard
from magellano.backend import mx, tree_flatten
from magellano.names import METRICS
from magellano.profile import Profile
from magellano.progress import Progress
from magellano.trainer import Trainer, run_to_end

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"


def run(
    out: Path, profile: Profile, tokens: Path, base: Path, adapter: Path, work: Path, progress: Progress
) -> dict[str, Any]:
    """Train the adapter by [train] and [loss]; resumes from `work`. Raises Stopped on a signal, the state saved, and
    OutOfMemory before anything is loaded where the run is planned larger than [memory] allows.
    """
    with memory.hold(profile) as (fitting, held):
        model = loader.load_release(adapter, base, fitting.train.compute)
        trainer = Trainer(model, fitting.train, tokens, profile.loss, profile.memory.limit_gib, profile.lora.plus)
        facts = {**run_to_end(trainer, work, progress, tensorboard.mirror(profile, work)), **held}
    lora.save(out, profile.model, profile.lora, trainer.tensors())
    mx.save_safetensors(str(out / OPTIMIZER), dict(tree_flatten(trainer.optimizer.state)))
    position = {"step": trainer.step, "target_tokens": trainer.tokens, "loss_scale": asdict(trainer.scale)}
    (out / STATE).write_text(json.dumps(position, indent=2) + "\n", encoding="utf-8")
    (out / METRICS).write_bytes((work / METRICS).read_bytes())
    return facts
