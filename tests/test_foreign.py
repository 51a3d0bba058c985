"""Folders as transformers writes them, made by hand: what is read, what is refused. The real one: tests/peers."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magellano import blackmamba, cli, export, foreign, loader, nf4
from magellano.backend import mx
from magellano.errors import InputError
from magellano.layout import HEAD, parameters
from magellano.model import MagellanoLM, seeded
from magellano.names import Gate, Hidden, LayerKind, LoraTarget
from magellano.profile import ModelConfig, load_profile
from magellano.tokenizer import Tokenizer
from tests import models

CONFIG = {
    "model_type": "mamba", "vocab_size": 300, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2,
    "time_step_rank": 3, "conv_kernel": 4, "expand": 2, "tie_word_embeddings": False, "eos_token_id": 7,
    "hidden_act": "silu", "use_bias": False, "use_conv_bias": True, "layer_norm_epsilon": 1e-5,
}  # fmt: skip
SHAPE = ModelConfig(
    **foreign.dense(2), d_model=16, d_state=4, dt_rank=3, vocab_size=300, norm_eps=1e-5, tied=False
)  # fmt: skip


def write(folder: Path, changes: dict[str, Any] | None = None, without: str = "", tied: bool = False) -> MagellanoLM:
    shape, source = SHAPE.model_copy(update={"tied": tied}), seeded(1)
    folder.mkdir(exist_ok=True)
    config = {k: v for k, v in (CONFIG | {"tie_word_embeddings": tied} | (changes or {})).items() if v is not None}
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {spec.name: source(spec) for spec in parameters(shape) if spec.name != without}
    mx.save_safetensors(str(folder / "model.safetensors"), tensors)
    return MagellanoLM(shape, source)


def test_it_is_read_as_it_stands(tmp_path: Path):
    wanted = write(tmp_path)
    model = foreign.read(tmp_path)
    assert (model.config, model.end_of_text) == (SHAPE, 7)
    take = model.source()
    weights = {spec.name: take(spec) for spec in parameters(model.config)}
    tokens = mx.array([[1, 2, 3, 4]])
    assert mx.array_equal(MagellanoLM(SHAPE, lambda spec: weights[spec.name])(tokens), wanted(tokens)).item()


def test_a_rank_that_is_auto_and_what_may_be_left_out(tmp_path: Path):
    write(tmp_path, {"time_step_rank": "auto", "hidden_size": 33, "expand": 2.0, "hidden_act": None, "use_bias": None})
    assert foreign.read(tmp_path).config.dt_rank == 3
    write(tmp_path, {"model_type": "falcon_mamba", "eos_token_id": [9, 1]})
    model = foreign.read(tmp_path)
    assert (model.config.dt_norm_eps, model.end_of_text) == (1e-6, 9)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model_type": "llama"}, "model_type 'llama'"),
        ({"model_type": None}, "model_type None"),
        ({"model_type": None, "mamba_moe_layers": ["r", "8"]}, "BlackMamba"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_bias": True}, "use_bias"),
        ({"use_bias": 0}, "use_bias"),
        ({"use_conv_bias": False}, "use_conv_bias"),
        ({"hidden_size": "16"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 0}, "n_layers"),
        ({"num_hidden_layers": 10**7}, "n_layers"),
        ({"state_size": 10**9}, "d_state"),
        ({"expand": 1.5}, "expand"),
        ({"intermediate_size": 33}, "intermediate_size"),
        ({"intermediate_size": "32"}, "intermediate_size"),
        ({"hidden_size": 0, "intermediate_size": 0}, "d_model"),
        ({"rms_norm": False}, "rms_norm"),
        ({"vocab_size": 100_000}, "vocab_size"),
        ({"eos_token_id": 300}, "eos_token_id"),
        ({"eos_token_id": []}, "eos_token_id"),
        ({"tie_word_embeddings": "yes"}, "tied"),
        ({"layer_norm_epsilon": "x"}, "x"),
    ],
)
def test_configs_that_are_not_ours_to_run(changes: dict[str, Any], told: str, tmp_path: Path):
    write(tmp_path, changes)
    with pytest.raises(InputError, match=told) as caught:
        foreign.read(tmp_path)
    assert "\n" not in str(caught.value)


def test_tensors_that_do_not_fit_the_config(tmp_path: Path):
    write(tmp_path, {"state_size": 5})
    with pytest.raises(InputError, match="shape"):
        foreign.read(tmp_path).source()
    write(tmp_path, without="backbone.layers.1.mixer.D")
    with pytest.raises(InputError, match=r"layers\.1\.mixer\.D is missing"):
        foreign.read(tmp_path).source()
    write(tmp_path, {"num_hidden_layers": 1})
    with pytest.raises(InputError, match="belongs to no parameter"):
        foreign.read(tmp_path).source()


def test_a_tied_head_must_be_the_embedding(tmp_path: Path):
    write(tmp_path, tied=True)
    first = foreign.read(tmp_path).source()(parameters(SHAPE)[0])
    tensors = mx.load(str(tmp_path / "model.safetensors"))
    mx.eval(tensors)
    for head, fine in ((first, True), (first + 1, False)):
        mx.save_safetensors(str(tmp_path / "model.safetensors"), tensors | {HEAD: head})
        take = foreign.read(tmp_path).source()
        if fine:
            assert mx.array_equal(take(parameters(SHAPE)[0]), first).item()
        else:
            with pytest.raises(InputError, match="lm_head is another matrix"):
                take(parameters(SHAPE)[0])


def test_a_pickle_is_not_read(tmp_path: Path):
    write(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"neither model\.safetensors"):
        foreign.read(tmp_path).source()


def test_without_a_tokenizer_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    pytest.importorskip("tokenizers", reason="pip install -r requirements-peers.lock")
    write(tmp_path / "m")
    for content in (None, "{}", '{"model": {"type": "Unigram"}, "decoder": {"type": "ByteLevel"}}', "x"):
        if content is not None:
            (tmp_path / "m" / "tokenizer.json").write_text(content)
        assert cli.main(["import", str(tmp_path / "m"), str(tmp_path / "out")]) == 2
        assert "tokenizer.json" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


def test_a_head_of_its_own_is_quantised_and_decodes():
    """The embedding stays dense, the head is an NF4 target; the decoder's logits are the model's."""
    assert [s.name for s in parameters(SHAPE) if s.target is LoraTarget.HEAD] == [HEAD]
    base = seeded(1)
    model = MagellanoLM(SHAPE, lambda spec: nf4.quantize(base(spec)) if spec.target is not None else base(spec))
    assert not mx.array_equal(model.head.base.dequantize(), model.backbone.embeddings.base).item()
    tokens = mx.array(np.random.default_rng(0).integers(0, 300, (2, 5)))
    decoder, state = model.decoder(), model.initial_state(2)
    for t in range(5):
        logits, state = decoder(tokens[:, t], state)
    wanted = model(tokens)[:, -1]
    assert mx.abs(logits - wanted).max().item() <= 2e-5 * mx.abs(wanted).max().item()


def test_norms_of_dt_b_and_c_stream_as_the_whole():
    normed = SHAPE.model_copy(update={"dt_norm_eps": 1e-6})
    model, plain = MagellanoLM(normed, seeded(1)), MagellanoLM(SHAPE, seeded(1))
    tokens = mx.array(np.random.default_rng(0).integers(0, 300, (2, 6)))
    whole = model(tokens)
    assert mx.abs(whole - plain(tokens)).max().item() > 0.001
    decoder, state = model.decoder(), model.initial_state(2)
    for t in range(6):
        logits, state = decoder(tokens[:, t], state)
        assert mx.abs(logits - whole[:, t]).max().item() <= 2e-5 * mx.abs(whole).max().item()


def test_a_profile_trains_no_head_of_its_own():
    with pytest.raises(InputError, match="head"):
        load_profile("phase2", {"model.tied": False})
    without = [t for t in LoraTarget if t is not LoraTarget.HEAD]
    assert not load_profile("phase2", {"model.tied": False, "lora.targets": without}).model.tied
    with pytest.raises(InputError, match=r"base\.source"):
        load_profile("demo", {"model.tied": False, "lora.targets": without})


def test_the_largest_sizes_hold_here_too():
    with pytest.raises(ValueError, match="d_state"):
        loader.check_sizes(SHAPE.model_copy(update={"d_state": 1 << 13}))


BLACK = {
    "num_layers": 4, "hidden_size": 32, "state_size": 4, "conv_dimension": 4, "vocab_size": 300, "expansion_factor": 2,
    "mamba_moe_layers": ["r", "8", "r", "8"], "ffn_hidden_size": 48, "add_bias_linear": False, "swiglu": True,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"add_bias_linear": True}, "add_bias_linear is True"),
        ({"swiglu": False}, "swiglu is False"),
        ({"routing_mode": "top1"}, "routing_mode"),
        ({"mamba_moe_layers": ["r", "8", "8", "r"]}, "mamba_moe_layers"),
        ({"mamba_moe_layers": ["r", "1", "r", "1"]}, "mamba_moe_layers"),
        ({"mamba_moe_layers": ["8", "8", "8", "8"]}, "moe_every"),
        ({"mamba_moe_layers": ["r", "8"]}, "num_layers"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"ffn_hidden_size": None}, "d_ff"),
    ],
)
def test_blackmambas_that_are_not_known(changes: dict[str, Any], told: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(BLACK))
    assert blackmamba.read(tmp_path, "silu").config.kind(1) is LayerKind.MOE
    (tmp_path / "config.json").write_text(json.dumps(BLACK | changes))
    with pytest.raises(InputError, match=told):
        blackmamba.read(tmp_path, "silu")


def test_a_blackmamba_asks_for_its_gates_and_for_torch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "config.json").write_text(json.dumps(BLACK))
    (tmp_path / blackmamba.WEIGHTS).write_bytes(b"")
    argv = ["import", str(tmp_path), str(tmp_path / "out")]
    for more, told in (([], "--glu silu or --glu gelu"), (["--glu", "gelu"], "torch reads it, which is not installed")):
        assert cli.main([*argv, *more]) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_what_mlx_lm_does_not_know_is_not_exported(tmp_path: Path):
    config = models.TINY.model_copy(update={"gate": Gate.SIGMOID, "hidden": Hidden.GEGLU})
    with pytest.raises(InputError, match="gated experts"):
        export.mlx_lm(tmp_path / "out", MagellanoLM(config), Tokenizer(300), "float32", False)
