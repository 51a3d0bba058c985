"""Model folders: shards, NF4 round trips, and refusals that name the file and the tensor."""

import json
import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magellano import headers, loader, nf4
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


def _model(**changed: Any) -> Callable[[Path], None]:
    """config.json with some of the model's keys changed."""

    def change(folder: Path) -> None:
        data = json.loads((folder / loader.CONFIG).read_text())
        data["model"] |= changed
        (folder / loader.CONFIG).write_text(json.dumps(data))

    return change


def _written(text: str | bytes, name: str = loader.CONFIG) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode()) and None


def _index(weight_map: Any) -> Callable[[Path], None]:
    """An index beside the one file; "all" stands for an honest table, into which the given one goes."""

    def write(folder: Path) -> None:
        honest = dict.fromkeys(mx.load(str(folder / loader.SINGLE)), loader.SINGLE)
        found = honest | weight_map["all"] if isinstance(weight_map, dict) and "all" in weight_map else weight_map
        (folder / loader.INDEX).write_text(json.dumps({"weight_map": found}))

    return write


def _replaced(name: str, by: Callable[[Path], object]) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / name).rename(folder / "moved")
        by(folder / name)

    return replace


def _link(path: Path) -> None:
    path.symlink_to("moved")


def _tensors(change: Callable[[dict[str, mx.array]], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = dict(mx.load(str(folder / loader.SINGLE)))
        mx.eval(tensors)
        change(tensors)
        mx.save_safetensors(str(folder / "new.safetensors"), tensors)
        (folder / "new.safetensors").rename(folder / loader.SINGLE)

    return write


NORM, IN_PROJ = "backbone.norm_f.weight", "backbone.layers.0.mixer.in_proj.weight"
W1 = "backbone.layers.3.mixer.experts.w1.weight"


def _nf4(name: str, **parts: Any) -> Callable[[Path], None]:
    """The tensor `name` in NF4, with some of its parts changed; None drops one."""

    def change(tensors: dict[str, mx.array]) -> None:
        w = tensors.pop(name)
        pieces = [nf4.quantize(x) for x in w] if w.ndim == 3 else [nf4.quantize(w)]
        tensors |= dict(loader.quantized_tensors(name, pieces, stacked=w.ndim == 3))
        for part, value in parts.items():
            if value is None:
                del tensors[f"{name}.{part}"]
            else:
                tensors[f"{name}.{part}"] = value(tensors[f"{name}.{part}"])

    return _tensors(change)


DEEP = '{"model":' + "[" * 100_000 + "]" * 100_000 + "}"
HOSTILE: dict[str, tuple[Callable[[Path], None], str, str]] = {  # what it is: (how it is made, its file, what is said)
    "n_layers 10**9": (_model(n_layers=10**9), loader.CONFIG, "model.n_layers: 1000000000 is more than 4,096"),
    "d_model 10**12": (_model(d_model=10**12), loader.CONFIG, "model.d_model: 1000000000000 is more than 131,072"),
    "n_experts 10**9": (_model(n_experts=10**9), loader.CONFIG, "model.n_experts: 1000000000 is more than"),
    "d_ff of 4,000 digits": (_model(d_ff=10**4000), loader.CONFIG, "model.d_ff"),
    "d_ff of 5,000 digits": (_written('{"model":{"d_ff":' + "9" * 5000 + "}}"), loader.CONFIG, "not valid JSON"),
    "d_model 0": (_model(d_model=0), loader.CONFIG, "d_model: Input should be greater than 0 (got 0)"),
    "d_model negative": (_model(d_model=-32), loader.CONFIG, "d_model: Input should be greater than 0"),
    "d_model true": (_model(d_model=True), loader.CONFIG, "d_model: Input should be a valid integer (got True)"),
    "d_model text": (_model(d_model="32"), loader.CONFIG, "d_model: Input should be a valid integer (got '32')"),
    "d_model a fraction": (_model(d_model=32.5), loader.CONFIG, "d_model: Input should be a valid integer"),
    "d_model null": (_model(d_model=None), loader.CONFIG, "d_model: Input should be a valid integer (got None)"),
    "d_model a list": (_model(d_model=[32]), loader.CONFIG, "d_model: Input should be a valid integer"),
    "vocab_size 10**9": (_model(vocab_size=10**9), loader.CONFIG, "vocab_size: Input should be less than or equal"),
    "moe_every 1": (_model(moe_every=1), loader.CONFIG, "moe_every must be 2 or more"),
    "norm_eps NaN": (_model(norm_eps=float("nan")), loader.CONFIG, "NaN is no number"),
    "norm_eps infinite": (_model(norm_eps=float("inf")), loader.CONFIG, "Infinity is no number"),
    "norm_eps 1e999": (_written('{"model":{"norm_eps":1e999}}'), loader.CONFIG, "1e999 is too large a number"),
    "norm_eps 0": (_model(norm_eps=0.0), loader.CONFIG, "norm_eps: Input should be greater than 0"),
    "an unknown key": (_model(auto_map="x.py"), loader.CONFIG, "auto_map: Extra inputs are not permitted"),
    "a key of two lines": (_model(**{"a\nb": 1}), loader.CONFIG, "a\\nb: Extra inputs are not permitted"),
    "model a list": (_written('{"model":[]}'), loader.CONFIG, "should be a valid dictionary"),
    "model null": (_written('{"model":null}'), loader.CONFIG, "should be a valid dictionary"),
    "config empty": (_written(""), loader.CONFIG, "not valid JSON"),
    "config a list": (_written("[]"), loader.CONFIG, "not a JSON object but []"),
    "config deep": (_written(DEEP), loader.CONFIG, "nested too deep"),
    "config not UTF-8": (_written(b'{"model":"\xff"}'), loader.CONFIG, "not UTF-8 (byte 10)"),
    "config UTF-16": (_written('{"model":1}'.encode("utf-16")), loader.CONFIG, "not UTF-8 (byte 0)"),
    "a key twice": (_written('{"model":{},"model":{}}'), loader.CONFIG, "the key 'model' stands twice"),
    "d_model twice": (_written('{"model":{"d_model":1,"d_model":32}}'), loader.CONFIG, "'d_model' stands twice"),
    "config of 2 MB": (_written('{"a":"' + "x" * (2 << 20) + '"}'), loader.CONFIG, "bytes, more than the 1,048,576"),
    "config a FIFO": (_replaced(loader.CONFIG, os.mkfifo), loader.CONFIG, "a FIFO, not a regular file"),
    "config a folder": (_replaced(loader.CONFIG, os.mkdir), loader.CONFIG, "a folder, not a regular file"),
    "config a link": (_replaced(loader.CONFIG, _link), loader.CONFIG, "a symbolic link"),
    "weights a FIFO": (_replaced(loader.SINGLE, os.mkfifo), loader.SINGLE, "a FIFO, not a regular file"),
    "weights a folder": (_replaced(loader.SINGLE, os.mkdir), loader.SINGLE, "a folder, not a regular file"),
    "weights a link": (_replaced(loader.SINGLE, _link), loader.SINGLE, "a symbolic link"),
    "a shard upwards": (_index({"all": {NORM: "../x"}}), loader.INDEX, "norm_f.weight' is to be in '../x'"),
    "an absolute shard": (_index({"all": {NORM: "/etc/passwd"}}), loader.INDEX, "to be in '/etc/passwd', which is no"),
    "a shard in a folder": (_index({"all": {NORM: "a/b"}}), loader.INDEX, "to be in 'a/b', which is no file's name"),
    "a Windows shard": (_index({"all": {NORM: "..\\x"}}), loader.INDEX, "to be in '..\\\\x', which is no file's"),
    "a shard ..": (_index({"all": {NORM: ".."}}), loader.INDEX, "to be in '..', which is no file's name"),
    "a shard without name": (_index({"all": {NORM: ""}}), loader.INDEX, "to be in '', which is no file's name"),
    "a shard with NUL": (_index({"all": {NORM: "a\0b"}}), loader.INDEX, "to be in 'a\\x00b', which is no file's name"),
    "a shard of 5,000": (_index({"all": {NORM: "x" * 5000}}), loader.INDEX, "is not there"),
    "a shard that is 7": (_index({"all": {NORM: 7}}), loader.INDEX, "to be in 7, which is no file's name"),
    "a shard that is null": (_index({"all": {NORM: None}}), loader.INDEX, "to be in None, which is no file's name"),
    "a shard not there": (_index({"all": {NORM: "gone"}}), loader.INDEX, "shard 'gone' is not there"),
    "a shard without header": (_index({"all": {NORM: loader.CONFIG}}), loader.CONFIG, "a header of "),
    "a tensor not in it": (_index({"all": {"x": loader.SINGLE}}), loader.SINGLE, "tensor 'x' is said to be in it by"),
    "a tensor unlisted": (_index({NORM: loader.SINGLE}), loader.SINGLE, "is in it, but not in the index"),
    "no weight_map": (_written("{}", loader.INDEX), loader.INDEX, "weight_map: not a table"),
    "weight_map a list": (_index([loader.SINGLE]), loader.INDEX, "weight_map: not a table"),
    "weight_map empty": (_index({}), loader.INDEX, "weight_map: not a table"),
    "index deep": (_written(DEEP, loader.INDEX), loader.INDEX, "nested too deep"),
    "index a FIFO": (lambda f: os.mkfifo(f / loader.INDEX), loader.INDEX, "a FIFO, not a regular file"),
    "index a link": (lambda f: (f / loader.INDEX).symlink_to("x"), loader.INDEX, "a symbolic link"),
    "one more tensor": (_tensors(lambda t: t.update(x=mx.zeros(3))), loader.SINGLE, "tensor x belongs to no parameter"),
    "one more layer": (
        _tensors(lambda t: t.update({"backbone.layers.4.norm.weight": mx.zeros(32)})), loader.SINGLE,
        "tensor backbone.layers.4.norm.weight belongs to no parameter",
    ),
    "transposed": (_tensors(lambda t: t.update({IN_PROJ: t[IN_PROJ].T})), loader.SINGLE, "has shape (32, 128), the"),
    "flat": (_tensors(lambda t: t.update({IN_PROJ: t[IN_PROJ].reshape(-1)})), loader.SINGLE, "has shape (4096,), the"),
    "integers": (
        _tensors(lambda t: t.update({NORM: t[NORM].astype(mx.int32)})), loader.SINGLE,
        f"tensor {NORM} is I32; save it as F32 or F16 or BF16",
    ),
    "NF4 without codes": (_nf4(IN_PROJ, codes=None), "", f"tensor {IN_PROJ} is neither whole in NF4 nor dense"),
    "NF4 without maxima": (_nf4(W1, scale_absmax=None), "", f"tensor {W1} is neither whole in NF4 nor dense"),
    "NF4 codes too few": (_nf4(IN_PROJ, codes=lambda x: x[:-1]), loader.SINGLE, "has shape (2047,), the config says"),
    "NF4 codes as floats": (
        _nf4(IN_PROJ, codes=lambda x: x.astype(mx.float32)), loader.SINGLE, ".codes is F32; save it as U8",
    ),
    "NF4 stack one short": (_nf4(W1, scale_codes=lambda x: x[:2]), loader.SINGLE, "has shape (2, 12), the config says"),
    "NF4 and dense": (
        _tensors(lambda t: t.update({f"{IN_PROJ}.scale_offset": mx.zeros(1)})), "", "is neither whole in NF4 nor dense",
    ),
    "a norm in NF4": (_nf4("backbone.layers.0.norm.weight"), loader.SINGLE, "belongs to no parameter"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_folder_is_refused(tmp_path: Path, what: str) -> None:
    """One line with file, place and remedy, and next to nothing is allocated on the way there."""
    written(tmp_path)
    make, file, said = HOSTILE[what]
    make(tmp_path)
    active = mx.get_active_memory()
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as refused:
            loader.Files(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    text = str(refused.value)
    assert text.startswith(str(tmp_path / file) + ":"), text
    assert said in text
    assert any(remedy in text for remedy in (loader.REMEDY, headers.REMEDY, "put the file itself", "save it as")), text
    assert text.isprintable(), ascii(text)
    assert len(text) < 800
    assert peak < 8 << 20
    assert mx.get_active_memory() <= active


def test_a_quantised_tensor_passes_the_same_checks(tmp_path: Path) -> None:
    """The table above refuses changed parts alone: unchanged ones are taken."""
    written(tmp_path)
    for name in (IN_PROJ, W1):
        _nf4(name)(tmp_path)
    assert f"{W1}.codes" in loader.Files(tmp_path)
    assert loader.load_model(tmp_path, "float32")(TOKENS).shape == (2, 9, 300)
