"""attach_lora: a quantised base -> the adapter at its start, its targets, counts and what training will need."""

from pathlib import Path
from typing import Any

from magellano import layout, loader, lora
from magellano.errors import InputError
from magellano.profile import Profile


def run(out: Path, profile: Profile, base: Path) -> dict[str, Any]:
    """Write the starting adapter for the base folder `base`."""
    config, _ = loader.read_config(base)
    if config != profile.model:
        raise InputError(f"{base}: its shape is not the profile's [model]; run the quantize stage again")
    tensors = lora.start(config, profile.lora)
    lora.save(out, config, profile.lora.model_copy(update={"plus": 1.0}), tensors)  # which is no setting of this stage
    trainable, total = layout.lora_count(config, profile.lora), layout.count(config)
    return {"trainable": trainable, "parameters": total, "share": trainable / total, "tensors": len(tensors)}
