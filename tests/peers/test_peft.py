"""Adapters to and from the real PEFT on the real transformers Mamba: same logits; and what does not agree."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magellano import cli, foreign, loader, lora, peft_adapter
from magellano.backend import mx
from magellano.errors import InputError
from magellano.hf_tokenizer import save
from magellano.model import MagellanoLM
from magellano.names import LoraTarget
from magellano.profile import LoraConfig
from magellano.tokenizer import Tokenizer
from tests import models

transformers = pytest.importorskip("transformers", reason="pip install -r requirements-peers.lock")
torch = pytest.importorskip("torch", reason="pip install -r requirements-peers.lock")
peft = pytest.importorskip("peft", reason="pip install -r requirements-peers.lock")

SIZES = {"vocab_size": 300, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 3, "time_step_rank": 3}
TOKENS = np.random.default_rng(0).integers(0, 300, (2, 20))


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A random Mamba of transformers with our tokenizer, imported to `ours` beside it."""
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES, eos_token_id=299))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if not name.endswith("A_log"):
                p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(tmp_path / "theirs")
    save(tmp_path / "theirs", Tokenizer(300), chat=False)
    assert cli.main(["import", str(tmp_path / "theirs"), str(tmp_path / "ours")]) == 0
    return tmp_path


def theirs(base: Path) -> Any:
    return transformers.MambaForCausalLM.from_pretrained(base / "theirs").eval()


def logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(TOKENS)).logits.numpy()


@pytest.mark.parametrize(("rslora", "kind"), [(False, "lora"), (True, "lora"), (False, "dora")])
def test_our_adapter_runs_in_peft(rslora: bool, kind: str, base: Path):
    ours = loader.load_model(base / "ours", "float32")
    plain = np.array(ours(mx.array(TOKENS)))
    settings = LoraConfig(
        rank=4, alpha=12.0, targets=("in_proj", "x_proj"), ranks={"x_proj": 2}, rank_pattern={"layers.1.in_proj": 6},
        rslora=rslora, kind=kind,
    )  # fmt: skip
    tensors = models.adapter(ours.config, settings, base=lora.base_of_model(ours))
    (base / "adapter").mkdir()
    peft_adapter.write(base / "adapter", ours.config, settings, tensors, str(base / "theirs"))
    lora.attach(ours, settings, tensors)
    got = logits(peft.PeftModel.from_pretrained(theirs(base), base / "adapter"))
    np.testing.assert_allclose(got, np.array(ours(mx.array(TOKENS))), atol=1e-3)
    assert np.abs(got - plain).max() > 0.05
    back, again = peft_adapter.read(base / "adapter", ours.config, lora.base_of_model(ours))
    assert [back.rank_of(LoraTarget.IN_PROJ, layer) for layer in range(3)] == [4, 6, 4]
    assert back.rank_of(LoraTarget.X_PROJ, 1) == 2
    lora.attach(ours, back, again)
    np.testing.assert_allclose(np.array(ours(mx.array(TOKENS))), got, atol=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 8, "target_modules": ["in_proj", "x_proj"]},
        {"r": 4, "lora_alpha": 8, "target_modules": ["in_proj", "dt_proj"], "use_rslora": True},
        {"r": 3, "lora_alpha": 5, "target_modules": ["in_proj", "x_proj"],
         "rank_pattern": {"layers.1.mixer.in_proj": 6}, "alpha_pattern": {"x_proj": 20, "layers.1.mixer.in_proj": 2}},
        {"r": 2, "lora_alpha": 4, "target_modules": ["x_proj"], "layers_to_transform": [0, 2]},
        {"r": 2, "lora_alpha": 4, "target_modules": ["in_proj"], "layers_to_transform": [0, 2], "use_dora": True},
    ],
)  # fmt: skip
def test_their_adapter_is_merged_here(settings: dict[str, Any], base: Path):
    model = peft.get_peft_model(theirs(base), peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name and "dt_proj" not in name:  # where it would have no effect, training leaves it at zero
                p.copy_(0.5 * torch.randn_like(p))
            if "lora_magnitude" in name:
                p.mul_(1.0 + 0.3 * torch.rand_like(p))
    model.save_pretrained(base / "adapter")
    argv = ["import", str(base / "adapter"), str(base / "merged"), "--base", str(base / "ours")]
    assert cli.main(argv) == 0
    wanted = logits(model.eval())
    np.testing.assert_allclose(
        np.array(loader.load_model(base / "merged", "float32")(mx.array(TOKENS))), wanted, atol=1e-3
    )
    assert np.abs(wanted - logits(theirs(base))).max() > 0.02


def test_what_transformers_does_with_dt_proj_and_peft_with_out_proj(base: Path):
    """Why these are refused: should either change, this fails and they can be let in."""
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["dt_proj"])
    model = peft.get_peft_model(theirs(base), config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.fill_(1.0)
    np.testing.assert_allclose(logits(model), logits(theirs(base)), atol=1e-5)
    with pytest.raises(ValueError, match="incompatible with Mamba"):
        peft.get_peft_model(theirs(base), peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["out_proj"]))
    model.save_pretrained(base / "adapter")
    with pytest.raises(InputError, match="past its adapter"):
        peft_adapter.read(base / "adapter", loader.read_config(base / "ours")[0])


@pytest.mark.parametrize("target", [t for t in LoraTarget if t in peft_adapter.WHY_NOT])
def test_modules_that_do_not_agree_are_named(target: LoraTarget, base: Path):
    config = loader.read_config(base / "ours")[0] if target not in ("w1", "w2") else models.TINY
    settings = LoraConfig(rank=2, targets=("in_proj", target))
    with pytest.raises(InputError, match=rf"{target}: .*magellano fuse"):
        peft_adapter.write(base, config, settings, {}, "")
    with pytest.raises(InputError, match="experts"):
        peft_adapter.write(base, models.TINY, LoraConfig(rank=2, targets=("in_proj",)), {}, "")


def test_an_adapter_that_carries_the_error_of_a_base_stays_with_it(tmp_path: Path):
    config = models.TINY.model_copy(update=foreign.dense(2))
    with pytest.raises(InputError, match=r"error of its NF4 base .*magellano fuse"):
        peft_adapter.write(tmp_path, config, LoraConfig(targets=("in_proj",), init="loftq"), {}, "")


def test_a_head_of_its_own_agrees(tmp_path: Path):
    torch.manual_seed(0)
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**SIZES, tie_word_embeddings=False)).eval()
    model.save_pretrained(tmp_path / "theirs")
    there = foreign.read(tmp_path / "theirs")
    ours = MagellanoLM(there.config, there.source())
    settings = LoraConfig(rank=3, targets=("head", "in_proj"))
    tensors = models.adapter(there.config, settings)
    (tmp_path / "adapter").mkdir()
    peft_adapter.write(tmp_path / "adapter", there.config, settings, tensors, "")
    lora.attach(ours, settings, tensors)
    got = logits(peft.PeftModel.from_pretrained(model, tmp_path / "adapter"))
    np.testing.assert_allclose(got, np.array(ours(mx.array(TOKENS))), atol=1e-3)
    back, again = peft_adapter.read(tmp_path / "adapter", there.config)
    other = MagellanoLM(there.config, there.source())
    lora.attach(other, back, again)
    np.testing.assert_allclose(np.array(other(mx.array(TOKENS))), got, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"use_dora": True}, "in_proj.lora_magnitude_vector is missing"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"lora_alpha": 0}, "lora_alpha"),
        ({"alpha_pattern": {"(x|y)+$": 2}}, "alpha_pattern"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_settings_that_are_not_known(changes: dict[str, Any], told: str, tmp_path: Path):
    config = models.TINY.model_copy(update=foreign.dense(2))
    settings = LoraConfig(rank=2, targets=("in_proj",))
    peft_adapter.write(tmp_path, config, settings, models.adapter(config, settings), "")
    assert peft_adapter.read(tmp_path, config)
    path = tmp_path / lora.CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(InputError, match=told):
        peft_adapter.read(tmp_path, config)


def test_tensors_that_do_not_fit(tmp_path: Path):
    config = models.TINY.model_copy(update=foreign.dense(2))
    settings = LoraConfig(rank=2, targets=("in_proj",))
    tensors = models.adapter(config, settings)
    peft_adapter.write(tmp_path, config, settings, tensors, "")
    good = mx.load(str(tmp_path / lora.WEIGHTS))
    mx.eval(good)
    name = "base_model.model.backbone.layers.0.mixer.in_proj.lora_A.weight"
    for change, told in (
        ({name: mx.zeros((2, 17))}, "does not fit"),
        ({name: mx.zeros((3, 16))}, "ranks 3 and 2"),
        ({name.replace("lora_A.weight", "lora_magnitude_vector"): mx.zeros((64,))}, "no adapter on"),
        ({name: mx.zeros((2, 16), dtype=mx.int32)}, "does not fit"),
        ({name: mx.zeros((2, 16, 1))}, "does not fit"),
        ({name.replace("in_proj", "out_proj"): mx.zeros((2, 32))}, "no adapter on"),
        ({name.replace("layers.0", "layers.9"): mx.zeros((2, 16))}, "no adapter on"),
    ):
        mx.save_safetensors(str(tmp_path / lora.WEIGHTS), good | change)
        with pytest.raises(InputError, match=told):
            peft_adapter.read(tmp_path, config)
