"""DoRA against its formula, m (W + s B A) / |W + s B A| with the norm held fixed in the gradient, on every target."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from magellano import decode, fuse, lora, merge
from magellano.backend import mx
from magellano.backprop import Backprop, Batch
from magellano.errors import InputError
from magellano.generate import generate
from magellano.layout import ParamSpec, parameters
from magellano.linear import Weight
from magellano.model import MagellanoLM
from magellano.names import Compute, LoraKind, LoraTarget
from magellano.ops.moe import Room
from magellano.profile import LoraConfig, ModelConfig, load_profile
from magellano.trainer import Trainer, run_to_end
from tests import models
from tests.training import CONFIG, digest, make_tokens, silent

SMALL = ModelConfig(d_model=64, n_layers=4, n_experts=3, d_ff=64, d_state=4, dt_rank=4, vocab_size=300)
TARGETS = tuple(t for t in LoraTarget if t is not LoraTarget.HEAD)
DORA = LoraConfig(kind="dora", rank=4, alpha=12.0, targets=TARGETS, rank_pattern={"layers.1": 3})
PARTS = ("lora_a", "lora_b", "lora_m")
RNG = np.random.default_rng(2)
TOKENS, TARGET_IDS = (mx.array(RNG.integers(0, 300, (2, 13))) for _ in range(2))
BATCH = Batch(TOKENS, TARGET_IDS, mx.array(RNG.random((2, 13))), mx.array((RNG.random((2, 13)) < 0.3).astype(np.uint8)))


def adapter(model: MagellanoLM, seed: int = 1) -> dict[str, mx.array]:
    """Every array away from its start; lengths from half to twice the rows'."""
    rng, start = np.random.default_rng(seed), lora.start(SMALL, DORA, lora.base_of_model(model))
    return {
        name: value * mx.array(rng.uniform(0.5, 2.0, value.shape).astype(np.float32))
        if name.endswith("lora_m")
        else mx.array(rng.normal(0, 0.2, value.shape).astype(np.float32))
        for name, value in start.items()
    }


def formula(w: mx.array, a: mx.array, b: mx.array, m: mx.array, scale: float) -> mx.array:
    whole = w + scale * (b @ a)
    norm = mx.sqrt(mx.stop_gradient(whole).square().sum(axis=-1, keepdims=True))
    return m.reshape(*whole.shape[:-1], 1) * whole / norm


def dense(model: MagellanoLM) -> MagellanoLM:
    """The same base in dense weights that train."""

    def source(spec: ParamSpec) -> Weight:
        held = dict(merge.tensors_by_name(model))[spec.name]
        return held if isinstance(held, mx.array) else merge.weight(held)

    return MagellanoLM(SMALL, source)


@pytest.fixture(scope="module")
def base() -> MagellanoLM:
    return models.quantized(SMALL)


def adapted(base: MagellanoLM, *, quantized: bool = True) -> tuple[MagellanoLM, dict[str, mx.array], MagellanoLM]:
    """A model with an adapter, that adapter, and the merged model by the formula."""
    lora.detach(base)
    model, tensors, plain = base if quantized else dense(base), adapter(base), dense(base)
    for _, path, scale in targets():
        module = lora.find(plain, path)
        module.weight = formula(module.weight, *(tensors[f"{path}.{part}"] for part in PARTS), scale)
    lora.attach(model, DORA, tensors)
    return model, tensors, plain


def targets() -> Iterator[tuple[ParamSpec, str, float]]:
    for spec in parameters(SMALL):
        if spec.target in TARGETS:
            yield spec, lora.module_path(spec), lora.scale(DORA, spec.target, spec.layer)


def relative(a: mx.array, b: mx.array) -> float:
    return float(mx.abs(a - b).max() / mx.abs(b).max())


@pytest.mark.parametrize("quantized", [False, True])
def test_it_is_the_formula_whole_and_merged_and_in_each_expert(base: MagellanoLM, quantized: bool) -> None:
    model, _, plain = adapted(base, quantized=quantized)
    assert relative(model(TOKENS), plain(TOKENS)) < 1e-5
    for spec in parameters(SMALL):
        if spec.target is not None:
            path = lora.module_path(spec)
            assert relative(merge.weight(lora.find(model, path)), lora.find(plain, path).weight) < 1e-5, path


@pytest.mark.parametrize("form", ["layers", "whole", "rooms"])
@pytest.mark.parametrize("quantized", [False, True])
def test_every_gradient_is_the_formula_s(
    base: MagellanoLM, form: str, quantized: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By mx.vjp of the formula from the gradients of the merged weights; experts in rooms as on a GPU, where layers are
    compiled too.
    """
    monkeypatch.setattr(mx, "compile", lambda function: function)
    lora.detach(base)
    bare = dense(base)
    model, tensors, plain = adapted(base, quantized=quantized)
    of, backprop = Backprop(plain)(BATCH, 0.3).gradients, Backprop(model, keeps=form == "whole")
    if form == "rooms":
        backprop._compiles, backprop._tokens = True, TOKENS.size
        backprop._rooms = {3: Room((((2,), TOKENS.size), ((0, 1), TOKENS.size)), 3)}
    found = backprop(BATCH, 0.3)
    assert found.gradients.keys() == tensors.keys()
    for spec, path, scale in targets():
        w = lora.find(bare, path).weight
        given = [tensors[f"{path}.{part}"] for part in PARTS]
        wanted = mx.vjp(lambda a, b, m, w=w, s=scale: formula(w, a, b, m, s), given, [of[spec.name]])[1]
        for part, value in zip(PARTS, wanted, strict=True):
            assert relative(found.gradients[f"{path}.{part}"], value) < 1e-4, f"{path}.{part}"
    squares = sum(float(g.square().sum()) for g in found.gradients.values())
    assert float(found.squares.sum()) == pytest.approx(squares, rel=1e-5)


def test_the_start_changes_nothing_also_where_b_does_not_start_at_zero(base: MagellanoLM) -> None:
    lora.detach(base)
    before = base(TOKENS)
    lora.attach(base, DORA, lora.start(SMALL, DORA, lora.base_of_model(base)))
    assert mx.array_equal(base(TOKENS), before).item()
    factors = {name: value for name, value in adapter(base).items() if not name.endswith("lora_m")}
    plain = DORA.model_copy(update={"kind": LoraKind.LORA})
    started = factors | lora.magnitudes(SMALL, DORA, factors, lora.base_of_model(base))
    lora.attach(base, plain, factors)
    wanted = base(TOKENS)
    lora.attach(base, DORA, started)
    assert relative(base(TOKENS), wanted) < 1e-5


@pytest.mark.parametrize("small", [True, False], ids=["merged", "from the codes"])
def test_a_decoder_is_the_full_forward(base: MagellanoLM, small: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not small:
        monkeypatch.setattr(decode, "_SMALL", 0)
    model, _, _ = adapted(base)
    decoder, state, full = model.decoder(), model.initial_state(2), model(TOKENS)
    for t in range(4):
        logits, state = decoder(TOKENS[:, t], state)
        assert relative(logits, full[:, t]) < 2e-5, f"token {t}"
    assert len(list(generate(model, [5, 6], 299, 3))) == 3


def test_files_have_pefts_names_and_round_trip(base: MagellanoLM, tmp_path: Path) -> None:
    model, tensors, _ = adapted(base)
    lora.save(tmp_path, SMALL, DORA, tensors)
    told, stored = json.loads((tmp_path / lora.CONFIG).read_text()), mx.load(str(tmp_path / lora.WEIGHTS))
    assert told["use_dora"] is True
    assert stored["base_model.model.backbone.layers.0.mixer.in_proj.lora_magnitude_vector"].shape == (256,)
    assert stored["base_model.model.backbone.layers.3.mixer.experts.2.w1.lora_magnitude_vector"].shape == (64,)
    settings, read = lora.load(tmp_path, SMALL)
    assert settings == DORA
    assert all(mx.array_equal(read[name], value).item() for name, value in tensors.items())
    assert read.keys() == tensors.keys()
    wanted = model(TOKENS)
    with fuse.without_adapters(model):
        plain = model(TOKENS)
    assert mx.array_equal(model(TOKENS), wanted).item()
    lora.detach(model)
    assert mx.array_equal(model(TOKENS), plain).item()
    del stored["base_model.model.backbone.layers.0.mixer.in_proj.lora_magnitude_vector"]
    (tmp_path / lora.WEIGHTS).unlink()
    mx.save_safetensors(str(tmp_path / lora.WEIGHTS), stored)
    with pytest.raises(InputError, match=r"in_proj\.lora_magnitude_vector is missing"):
        lora.load(tmp_path, SMALL)


def test_the_head_is_refused_with_the_remedy() -> None:
    with pytest.raises(InputError, match=r'"dora" is not there for the head; leave it out: targets = \["in_proj", "x_'):
        load_profile("demo", {"lora.kind": "dora"})


def test_it_trains_resumes_to_the_bit_and_follows_in_16_bits(tmp_path: Path) -> None:
    tokens = make_tokens(tmp_path / "tokens")
    settings = DORA.model_copy(update={"plus": 2.0})

    def trainer(compute: str = "float32", steps: int = 4) -> Trainer:
        model = models.quantized(SMALL)
        lora.attach(model, settings, lora.start(SMALL, settings, lora.base_of_model(model)))
        config = CONFIG.model_copy(update={"compute": Compute(compute), "steps": steps, "weight_decay": 0.1})
        return Trainer(model, config, tokens, plus=settings.plus)

    whole, first, second, half = trainer(), trainer(), trainer(), trainer("bfloat16")
    before = whole.tensors()
    run_to_end(whole, tmp_path / "whole", silent)
    for name, value in whole.tensors().items():
        assert mx.any(value != before[name]).item(), name
    first.one_step()
    first.save(tmp_path / "cut")
    assert second.resume(tmp_path / "cut")
    run_to_end(second, tmp_path / "cut", silent)
    assert digest(second) == digest(whole)
    full = trainer()
    for _ in range(2):
        assert half.one_step().loss == pytest.approx(full.one_step().loss, rel=2e-2)
