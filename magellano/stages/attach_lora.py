"""attach_lora: a quantised base -> the adapter at its start, its targets, counts and what training will need."""

import math
from pathlib import Path
from typing import Any

from magellano import files, layout, loader, loftq, lora, pipeline
from magellano.artifacts import MANIFEST
from magellano.errors import InputError
from magellano.names import BaseSource, LoraInit, LoraKind, Stage
from magellano.profile import Profile
from magellano.runs import input_folder
from magellano.stages import quantize


def run(out: Path, profile: Profile, base: Path) -> dict[str, Any]:
    """Write the starting adapter for the base folder `base`. InputError where lora.init is "loftq" and the weights that
    `base` was quantised from are not there any more.
    """
    config, _ = loader.read_config(base)
    if config != profile.model:
        raise InputError(f"{base}: its shape is not the profile's [model]; run the quantize stage again")
    facts: dict[str, Any] = {}
    if profile.lora.init is LoraInit.LOFTQ:
        original, lost = _original(profile, base), loftq.Lost()
        tensors = loftq.start(
            config, profile.lora, loader.Files(base), lambda spec: quantize.dense(spec, profile, original), lost
        )
        before, after = (math.hypot(*(pair[n] for pair in lost.values())) for n in (0, 1))
        if profile.lora.kind is LoraKind.DORA:
            tensors |= lora.magnitudes(config, profile.lora, tensors, loader.Files(base))
        facts = {"quantization_error": before, "quantization_error_left": after}
    else:
        tensors = lora.start(config, profile.lora, loader.Files(base))
    lora.save(out, config, profile.lora.model_copy(update={"plus": 1.0}), tensors)  # which is no setting of this stage
    trainable, total = layout.lora_count(config, profile.lora), layout.count(config)
    return {"trainable": trainable, "parameters": total, "share": trainable / total, "tensors": len(tensors), **facts}


def _original(profile: Profile, base: Path) -> loader.Files | None:
    """The weights that `base` was quantised from, by its manifest; None: the initial ones of base.seed."""
    if profile.base.source is BaseSource.SEEDED:
        return None
    remedy = 'or set lora.init to "zero"'
    if profile.base.source is BaseSource.PRETRAIN:
        folder = input_folder(base, Stage.PRETRAIN)
        if folder is None:
            raise InputError(
                f'{base}: lora.init "loftq" needs the base before it was quantised, which is not in the store any '
                f"more; run the pretrain stage again, {remedy}"
            )
        return loader.Files(folder)
    folder = pipeline.base_folder(profile)
    made_of = files.read_json(base / MANIFEST, lora.REMEDY).get("inputs", {})
    if not isinstance(made_of, dict) or made_of.get("base") != pipeline.base_digest(profile):
        raise InputError(
            f'{base}: lora.init "loftq" needs the weights that this base was quantised from, but base.folder {folder} '
            f"holds others now; run the quantize stage again, {remedy}"
        )
    return loader.Files(folder)
