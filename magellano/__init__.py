"""SCM Magellano: QLoRA fine-tuning of a Mamba-MoE language model on one machine.

    import magellano
    profile = magellano.load_profile("demo", overrides={"train.steps": 10})
    model = magellano.MagellanoLM(profile.model)
    logits = model(tokens)  # [B, T] -> [B, T, V]

Names are imported when they are first used, so that `magellano --help` needs no MLX.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from magellano import nf4, ops, optimizer
    from magellano.loader import load_model
    from magellano.model import MagellanoLM
    from magellano.profile import Profile, load_profile

__all__ = ["MagellanoLM", "Profile", "load_model", "load_profile", "nf4", "ops", "optimizer"]

_HOME = {
    "MagellanoLM": "model",
    "Profile": "profile",
    "load_model": "loader",
    "load_profile": "profile",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'magellano' has no attribute {name!r}")
    module = importlib.import_module(f"magellano.{_HOME.get(name, name)}")
    return getattr(module, name) if name in _HOME else module
