"""train: tokens, quantised base, starting adapter -> the trained adapter with its optimiser, position and metrics."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from magellano import loader, lora, plan
from magellano.backend import mx, on_gpu, tree_flatten
from magellano.errors import OutOfMemory
from magellano.names import METRICS
from magellano.profile import Profile
from magellano.progress import Progress
from magellano.trainer import Trainer, run_to_end

OPTIMIZER, STATE = "optimizer.safetensors", "state.json"


def run(
    out: Path, profile: Profile, tokens: Path, base: Path, adapter: Path, work: Path, progress: Progress
) -> dict[str, Any]:
    """Train the adapter by [train] and [loss]; resumes from `work`. Raises Stopped on a signal, the state saved."""
    _check_limit(profile)
    model = loader.load_release(adapter, base, profile.train.compute)
    trainer = Trainer(model, profile.train, tokens, profile.loss, profile.memory.limit_gib)
    facts = run_to_end(trainer, work, progress)
    lora.save(out, profile.model, profile.lora, trainer.tensors())
    mx.save_safetensors(str(out / OPTIMIZER), dict(tree_flatten(trainer.optimizer.state)))
    position = {"step": trainer.step, "target_tokens": trainer.tokens, "loss_scale": asdict(trainer.scale)}
    (out / STATE).write_text(json.dumps(position, indent=2) + "\n", encoding="utf-8")
    (out / METRICS).write_bytes((work / METRICS).read_bytes())
    return facts


def _check_limit(profile: Profile) -> None:
    """Refuse a run that is planned larger than memory.limit_gib, before anything is loaded."""
    gib = plan.fine_tune(profile, wide_compute=not on_gpu()).total / (1 << 30)
    limit = profile.memory.limit_gib
    if limit and gib > limit:
        raise OutOfMemory(
            f"profile {profile.name}: training needs about {gib:.2f} GiB, memory.limit_gib is {limit:g}; "
            "lower train.batch or data.seq_len, or raise the limit"
        )
