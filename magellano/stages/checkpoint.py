"""checkpoint: the trained state -> a sealed release: adapter, config, tokenizer, chat template, lineage; verified by
loading it again.
"""

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from magellano import loader, lora
from magellano.backend import mx
from magellano.data import template
from magellano.data.shards import Shards
from magellano.names import METRICS
from magellano.profile import Profile
from magellano.tokenizer import Tokenizer

LINEAGE, PROFILE = "lineage.json", "profile.json"


def run(
    out: Path, profile: Profile, trained: Path, base: Path, tokens: Path, lineage: dict[str, Any]
) -> dict[str, Any]:
    """Write the release and load it again from its files; AssertionError if what was read is not what was trained."""
    settings, tensors = lora.load(trained, profile.model)
    lora.save(out, profile.model, settings, tensors, base=_link(base))
    shutil.copyfile(base / loader.CONFIG, out / loader.CONFIG)
    shutil.copyfile(trained / METRICS, out / METRICS)
    Tokenizer.load(base).save(out)
    if os.path.lexists(tokens / template.FILE):
        shutil.copyfile(tokens / template.FILE, out / template.FILE)
    (out / LINEAGE).write_text(json.dumps(lineage, indent=2) + "\n", encoding="utf-8")
    operating = {"description", "evaluate", "memory", "gate", "disk", "notify", "logging"}
    made_by = profile.model_dump_json(indent=2, exclude=operating)
    (out / PROFILE).write_text(made_by + "\n", encoding="utf-8")
    return {"tensors": len(tensors), "held_out_loss": _verify(out, profile, base, tokens, tensors)}


def _link(base: Path) -> str:
    """The base's place relative to any artifact's folder, so that a moved home still works."""
    return f"../../{base.parent.name}/{base.name}"


def _verify(out: Path, profile: Profile, base: Path, tokens: Path, trained: dict[str, mx.array]) -> float:
    """Load the release from its files, compare it bit by bit, run it on a held-out row; returns that row's loss."""
    _, read = lora.load(out, profile.model)
    different = [name for name, value in trained.items() if not mx.array_equal(value, read[name]).item()]
    assert not different, f"the release read back differs from what was trained in {different[0]}"
    model = loader.load_release(out, base, profile.train.compute)
    row = Shards(tokens, "held_out").batch([0])
    nll, _ = model.scores(mx.array(row.tokens), mx.array(row.targets), mx.array(row.reset))
    loss = float(np.array((nll * mx.array(row.weights)).sum())) / max(1.0, float(row.weights.sum()))
    assert math.isfinite(loss), "the release gives no finite loss on the held-out split"
    return loss
