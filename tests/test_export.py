"""What `magellano export` writes, without the library that reads it (tests/peers has that)."""

import json
import stat
from pathlib import Path

import numpy as np
import pytest

from magellano import cli, export, hf_tokenizer, lora, merge
from magellano.backend import mx
from magellano.layout import parameters
from magellano.model import MagellanoLM, seeded
from magellano.profile import LoraConfig
from magellano.tensors import load_file
from magellano.tokenizer import Tokenizer, ranked
from tests import models
from tests.models import TINY


def test_merged_weights_are_the_model():
    """A dense model of the merged weights gives the logits of base and adapter."""
    adapted = models.quantized(TINY, LoraConfig(rank=4))
    weights = dict(merge.tensors(adapted, mx.float32))
    assert list(weights) == [spec.name for spec in parameters(TINY)]
    merged = MagellanoLM(TINY, lambda spec: weights[spec.name])
    tokens = mx.array(np.random.default_rng(0).integers(0, 300, (2, 30)))
    wanted = adapted(tokens)
    assert mx.abs(merged(tokens) - wanted).max().item() <= 1e-5 * mx.abs(wanted).max().item()
    plain = models.quantized(TINY)(tokens)
    assert mx.abs(plain - wanted).max().item() > 0.01 * mx.abs(wanted).max().item()


def test_16_bit_weights_keep_the_recurrence_in_float32():
    weights = dict(merge.tensors(MagellanoLM(TINY, seeded(3)), mx.bfloat16))
    wide = {name for name, value in weights.items() if value.dtype == mx.float32}
    assert {name.rsplit("mixer.", 1)[-1] for name in wide} == {
        "A_log", "D", "conv1d.bias", "dt_proj.bias", "router.weight",
    }  # fmt: skip
    w = lora.find(MagellanoLM(TINY, seeded(3)), "backbone.layers.0.mixer.in_proj").base
    assert mx.array_equal(weights["backbone.layers.0.mixer.in_proj.weight"], w.astype(mx.bfloat16)).item()


def test_the_folder_holds_what_it_needs_and_is_its_owners(tmp_path: Path):
    model, folder = MagellanoLM(TINY, seeded(3)), tmp_path / "out"
    facts = export.mlx_lm(folder, model, Tokenizer(300), "bfloat16", chat=False)
    names = {p.name for p in folder.iterdir()}
    assert names == {
        "config.json", "model.safetensors", export.MODEL_FILE, hf_tokenizer.FILE, hf_tokenizer.CONFIG,
    }  # fmt: skip
    assert all(stat.S_IMODE(p.stat().st_mode) == 0o600 for p in folder.iterdir())
    config = json.loads((folder / "config.json").read_text())
    assert config["model_file"] == export.MODEL_FILE
    assert config["eos_token_id"] == 299
    assert set(load_file(folder / "model.safetensors")) == {spec.name for spec in parameters(TINY)}
    assert facts["bytes"] < (folder / "model.safetensors").stat().st_size < facts["bytes"] + 10_000
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    models.write(tmp_path / "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    assert cli.main(["export", str(tmp_path / "model"), "--to", "mlx-lm", str(tmp_path / "out")]) == 2
    assert "something already" in capsys.readouterr().err
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]


def test_merges_make_their_tokens():
    """Each merge joins two tokens that come before the one it makes, and every longer token has one."""
    tokens = ranked(5000)
    ranks = {hf_tokenizer.spelled(token): rank for rank, token in enumerate(tokens)}
    made = hf_tokenizer._json(Tokenizer(5001))["model"]
    assert made["vocab"] == ranks | {hf_tokenizer.END: 5000}
    assert [ranks[a + b] for a, b in made["merges"]] == list(range(256, 5000))
    assert all(max(ranks[a], ranks[b]) < ranks[a + b] for a, b in made["merges"])
    assert len({hf_tokenizer.spelled(bytes([n])) for n in range(256)}) == 256
