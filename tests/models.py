"""Small model folders for tests."""

from pathlib import Path

import numpy as np

from magellano import loader, lora, nf4
from magellano.backend import mx
from magellano.layout import ParamSpec, parameters
from magellano.linear import Weight
from magellano.model import MagellanoLM, seeded
from magellano.profile import LoraConfig, ModelConfig
from magellano.tokenizer import Tokenizer

TINY = ModelConfig(d_model=16, n_layers=4, n_experts=4, d_ff=24, d_state=4, dt_rank=3, vocab_size=300)


def write(folder: Path, config: ModelConfig = TINY, seed: int = 3) -> MagellanoLM:
    """A dense model of seeded weights in `folder`, and the same in memory."""
    folder.mkdir(parents=True, exist_ok=True)
    source = seeded(seed)
    loader.write_model(folder, config, ((spec.name, source(spec)) for spec in parameters(config)), quantized=False)
    Tokenizer(config.vocab_size).save(folder)
    return MagellanoLM(config, source)


def adapter(
    config: ModelConfig, settings: LoraConfig, seed: int = 1, base: lora.Base | None = None
) -> dict[str, mx.array]:
    """An adapter whose every value is away from zero; DoRA's lengths are near those of `base`."""
    rng = np.random.default_rng(seed)
    start = lora.start(config, settings, base)
    made = {name: mx.array(rng.normal(0, 0.1, value.shape).astype(np.float32)) for name, value in start.items()}
    return {name: (1 + v) * start[name] if name.endswith("lora_m") else v for name, v in made.items()}


def quantized(config: ModelConfig, lora_settings: LoraConfig | None = None, seed: int = 3) -> MagellanoLM:
    """A model in NF4, with an adapter on it if settings are given."""
    base = seeded(seed)

    def source(spec: ParamSpec) -> Weight:
        w = base(spec)
        if spec.target is None or not isinstance(w, mx.array):
            return w
        return nf4.NF4Stack.of([nf4.quantize(x) for x in w]) if w.ndim == 3 else nf4.quantize(w)

    model = MagellanoLM(config, source)
    if lora_settings is not None:
        tensors = adapter(config, lora_settings, base=lora.base_of_model(model))
        lora.attach(model, lora_settings, tensors)
    return model
