"""Model folders: shards, NF4 round trips, and refusals that name the file and the tensor."""

import json
from pathlib import Path

import numpy as np
import pytest

from magellano import loader, nf4
from magellano.backend import mx
from magellano.errors import InputError
from magellano.model import MagellanoLM, seeded
from magellano.profile import ModelConfig, load_profile
from magellano.progress import silent
from magellano.stages import quantize

SMALL = ModelConfig(d_model=32, n_layers=4, n_experts=3, d_ff=24, d_state=4, dt_rank=4, vocab_size=300)
TOKENS = mx.array(np.random.default_rng(0).integers(0, 300, (2, 9)))


def written(folder: Path) -> MagellanoLM:
    model = MagellanoLM(SMALL, seeded(4))
    loader.write_model(folder, SMALL, loader.dense_tensors(model), quantized=False)
    return model


def test_shards_hold_what_one_file_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "SHARD_BYTES", 20_000)
    model = written(tmp_path)
    index = json.loads((tmp_path / loader.INDEX).read_text())
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == files
    assert mx.array_equal(loader.load_model(tmp_path, "float32")(TOKENS), model(TOKENS)).item()


def test_a_quantised_base_is_the_quantised_weights(tmp_path: Path) -> None:
    """Streamed from a dense folder and from the seed: the same files, and each matrix what nf4.quantize makes of it."""
    profile = load_profile("demo").model_copy(update={"model": SMALL})
    dense, streamed, made = (tmp_path / name for name in ("dense", "streamed", "seeded"))
    for folder in (dense, streamed, made):
        folder.mkdir()
    loader.write_model(dense, SMALL, loader.dense_tensors(MagellanoLM(SMALL, seeded(0))), quantized=False)
    facts = quantize.run(streamed, profile, dense, silent)
    quantize.run(made, profile, None, silent)
    assert (streamed / loader.SINGLE).read_bytes() == (made / loader.SINGLE).read_bytes()
    assert facts["quantized"] < facts["parameters"]
    source = loader.Files(made)
    for spec in (s for s in loader.parameters(SMALL) if s.target):
        weight, original = source(spec), seeded(0)(spec)
        assert not isinstance(weight, mx.array)
        got = (
            weight.dequantize()
            if isinstance(weight, nf4.NF4Tensor)
            else mx.stack([w.dequantize() for w in weight.tensors])
        )
        assert isinstance(original, mx.array)
        want = (
            mx.stack([nf4.quantize(w).dequantize() for w in original])
            if original.ndim == 3
            else nf4.quantize(original).dequantize()
        )
        assert mx.array_equal(got, want).item(), spec.name


def test_a_base_of_another_shape_is_refused(tmp_path: Path) -> None:
    written(tmp_path)
    other = load_profile("demo")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(InputError, match=r"its shape is not the profile's \[model\]; d_model 32 there, 160 here"):
        quantize.run(out, other, tmp_path, silent)


def _drop_a_tensor(folder: Path) -> None:
    tensors = dict(mx.load(str(folder / loader.SINGLE)))
    mx.eval(tensors)
    del tensors["backbone.norm_f.weight"]
    mx.save_safetensors(str(folder / loader.SINGLE), tensors)


def _shrink_a_tensor(folder: Path) -> None:
    tensors = dict(mx.load(str(folder / loader.SINGLE)))
    tensors["backbone.norm_f.weight"] = tensors["backbone.norm_f.weight"][:3]
    mx.eval(tensors)
    mx.save_safetensors(str(folder / loader.SINGLE), tensors)


@pytest.mark.parametrize(
    ("break_it", "said"),
    [
        (_drop_a_tensor, r"tensor backbone\.norm_f\.weight is missing"),
        (_shrink_a_tensor, r"norm_f\.weight has shape \(3,\), the config says \(32,\)"),
        (lambda f: (f / loader.SINGLE).unlink(), r"neither model\.safetensors nor"),
        (lambda f: (f / loader.SINGLE).write_bytes(b"\x08\0\0\0\0\0\0\0{}"), r"not a readable safetensors file"),
        (lambda f: (f / loader.CONFIG).unlink(), r"no config\.json; not a model folder"),
        (lambda f: (f / loader.CONFIG).write_text("{}"), r"not a model of this project"),
        (lambda f: (f / loader.CONFIG).write_text("{"), r"not a model of this project"),
    ],
)
def test_a_damaged_folder_is_refused(tmp_path: Path, break_it, said: str) -> None:
    written(tmp_path)
    break_it(tmp_path)
    with pytest.raises(InputError, match=said):
        loader.load_model(tmp_path, "float32")
