"""Adapters against the dense formula W + s B A, on every target, dense and NF4; files as PEFT names them."""

from pathlib import Path

import numpy as np
import pytest

from magellano import loader, lora, nf4
from magellano.backend import mx
from magellano.backprop import Backprop, Batch
from magellano.errors import InputError
from magellano.layout import ParamSpec, parameters
from magellano.linear import Weight
from magellano.model import MagellanoLM, seeded
from magellano.names import LoraTarget
from magellano.profile import LoraConfig, ModelConfig

SMALL = ModelConfig(d_model=32, n_layers=4, n_experts=3, d_ff=24, d_state=4, dt_rank=4, vocab_size=300)
LORA = LoraConfig(rank=4, alpha=12.0, ranks={LoraTarget.X_PROJ: 2})
TOKENS = mx.array(np.random.default_rng(0).integers(0, 300, (2, 13)))


def quantized(spec: ParamSpec) -> Weight:
    w = seeded(5)(spec)
    if spec.target is None:
        return w
    return nf4.NF4Stack.of([nf4.quantize(x) for x in w]) if w.ndim == 3 else nf4.quantize(w)


def dense(spec: ParamSpec) -> mx.array:
    w = quantized(spec)
    if isinstance(w, mx.array):
        return w
    return w.dequantize() if isinstance(w, nf4.NF4Tensor) else mx.stack([x.dequantize() for x in w.tensors])


def trained() -> dict[str, mx.array]:
    """An adapter with every B away from zero."""
    rng = np.random.default_rng(1)
    return {k: mx.array(rng.normal(0, 0.3, v.shape).astype(np.float32)) for k, v in lora.start(SMALL, LORA).items()}


def merged(spec: ParamSpec) -> mx.array:
    w, tensors, path = dense(spec), trained(), lora.module_path(spec)
    if spec.target is None:
        return w
    a, b = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
    return w + LORA.alpha / LORA.rank_of(spec.target) * (b @ a)


@pytest.mark.parametrize("source", [dense, quantized])
def test_adapter_equals_the_merged_weights(source) -> None:
    model = MagellanoLM(SMALL, source)
    lora.attach(model, LORA, trained())
    expected = MagellanoLM(SMALL, merged)(TOKENS)
    assert float(mx.abs(model(TOKENS) - expected).max() / mx.abs(expected).max()) < 1e-5


def test_gradients_equal_those_of_the_dense_formula() -> None:
    """dL/dA = s B^T dL/dW and dL/dB = s dL/dW A^T, with dL/dW from the merged model."""
    batch = Batch(TOKENS, TOKENS, mx.ones(TOKENS.shape), mx.zeros(TOKENS.shape, dtype=mx.uint8))
    model, full, tensors = MagellanoLM(SMALL, quantized), MagellanoLM(SMALL, merged), trained()
    lora.attach(model, LORA, tensors)
    model.chunk = full.chunk = 8
    grads, wanted = Backprop(model)(batch, 1.0).gradients, Backprop(full)(batch, 1.0).gradients
    assert set(grads) == set(tensors)
    for spec in parameters(SMALL):
        if spec.target is None:
            continue
        path, s, dw = lora.module_path(spec), LORA.alpha / LORA.rank_of(spec.target), wanted[spec.name]
        a, b = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
        for name, value in (("lora_a", s * (b.swapaxes(-1, -2) @ dw)), ("lora_b", s * (dw @ a.swapaxes(-1, -2)))):
            error = float(mx.abs(grads[f"{path}.{name}"] - value).max() / mx.abs(value).max())
            assert error < 1e-4, f"{path}.{name}: {error}"


def test_the_start_changes_nothing() -> None:
    model = MagellanoLM(SMALL, quantized)
    before = model(TOKENS)
    lora.attach(model, LORA, lora.start(SMALL, LORA))
    assert mx.array_equal(model(TOKENS), before).item()


def test_files_round_trip_and_have_pefts_names(tmp_path: Path) -> None:
    lora.save(tmp_path, SMALL, LORA, trained(), base="../../quantize/x")
    names = set(mx.load(str(tmp_path / lora.WEIGHTS)))
    assert "base_model.model.backbone.layers.0.mixer.in_proj.lora_A.weight" in names
    assert "base_model.model.backbone.layers.3.mixer.experts.2.w1.lora_B.weight" in names
    assert "base_model.model.lm_head.lora_A.weight" in names
    settings, read = lora.load(tmp_path, SMALL)
    assert settings == LORA
    for name, value in trained().items():
        assert mx.array_equal(read[name], value).item(), name


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    other = SMALL.model_copy(update={"d_model": 48})
    with pytest.raises(InputError, match="should have shape"):
        lora.attach(MagellanoLM(other), LORA, trained())
    with pytest.raises(InputError, match="not an adapter folder"):
        lora.load(tmp_path, SMALL)


def test_model_folders_round_trip(tmp_path: Path) -> None:
    model = MagellanoLM(SMALL, seeded(7))
    loader.write_model(tmp_path, SMALL, loader.dense_tensors(model), quantized=False)
    assert mx.array_equal(loader.load_model(tmp_path, "float32")(TOKENS), model(TOKENS)).item()
