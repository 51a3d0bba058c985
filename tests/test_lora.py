"""Adapters against the dense formula W + s B A, on every target, dense and NF4; files as PEFT names them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magellano import headers, loader, lora, nf4
from magellano.backend import mx, on_gpu
from magellano.backprop import Backprop, Batch
from magellano.errors import InputError
from magellano.layout import ParamSpec, parameters
from magellano.linear import Weight
from magellano.model import MagellanoLM, seeded
from magellano.names import LoraTarget
from magellano.profile import LoraConfig, ModelConfig

SMALL = ModelConfig(d_model=32, n_layers=4, n_experts=3, d_ff=24, d_state=4, dt_rank=4, vocab_size=300)
PATTERN = {"layers.1": 3, "layers.0-1.out_proj": 5, "w2": 6, "layers.3": 7}
LORA = LoraConfig(rank=4, alpha=12.0, ranks={LoraTarget.X_PROJ: 2}, rank_pattern=PATTERN)
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
    return w + LORA.alpha / LORA.rank_of(spec.target, spec.layer) * (b @ a)


def test_rslora_scales_by_the_root_of_each_rank(tmp_path: Path) -> None:
    rooted = LORA.model_copy(update={"rslora": True})
    assert lora.scale(rooted, LoraTarget.IN_PROJ) == 12.0 / 2.0
    assert lora.scale(rooted, LoraTarget.X_PROJ) == pytest.approx(12.0 / 2.0**0.5)
    lora.save(tmp_path, SMALL, rooted, trained())
    assert json.loads((tmp_path / lora.CONFIG).read_text())["use_rslora"] is True
    settings, tensors = lora.load(tmp_path, SMALL)
    assert settings == rooted
    model, plain = MagellanoLM(SMALL, dense), MagellanoLM(SMALL, dense)
    lora.attach(model, settings, tensors)
    larger = {}  # the same by larger B
    for spec in (spec for spec in parameters(SMALL) if spec.target is not None):
        path, of = lora.module_path(spec), (spec.target, spec.layer)
        larger |= {f"{path}.lora_a": tensors[f"{path}.lora_a"]}
        larger |= {f"{path}.lora_b": lora.scale(rooted, *of) / lora.scale(LORA, *of) * tensors[f"{path}.lora_b"]}
    lora.attach(plain, LORA, larger)
    wanted = plain(TOKENS)
    assert float(mx.abs(model(TOKENS) - wanted).max() / mx.abs(wanted).max()) < 1e-5


@pytest.mark.parametrize("source", [dense, quantized])
def test_adapter_equals_the_merged_weights(source) -> None:
    model = MagellanoLM(SMALL, source)
    lora.attach(model, LORA, trained())
    expected = MagellanoLM(SMALL, merged)(TOKENS)
    most = 5e-5 if on_gpu() else 1e-5  # two orders of the same sums
    assert float(mx.abs(model(TOKENS) - expected).max() / mx.abs(expected).max()) < most


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
        path, s, dw = lora.module_path(spec), LORA.alpha / LORA.rank_of(spec.target, spec.layer), wanted[spec.name]
        a, b = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
        for name, value in (("lora_a", s * (b.swapaxes(-1, -2) @ dw)), ("lora_b", s * (dw @ a.swapaxes(-1, -2)))):
            error = float(mx.abs(grads[f"{path}.{name}"] - value).max() / mx.abs(value).max())
            assert error < 1e-4, f"{path}.{name}: {error}"


@pytest.mark.parametrize(
    ("target", "layer", "rank"),
    [("in_proj", 0, 4), ("x_proj", 0, 2), ("x_proj", 1, 3), ("in_proj", 1, 3), ("out_proj", 1, 5), ("out_proj", 2, 4),
     ("w2", 7, 6), ("w2", 3, 7), ("w1", 3, 7), ("head", None, 4)],
)  # fmt: skip
def test_the_narrowest_pattern_gives_the_rank(target: str, layer: int | None, rank: int) -> None:
    assert LORA.rank_of(LoraTarget(target), layer) == rank
    backwards = LORA.model_copy(update={"rank_pattern": dict(reversed(PATTERN.items()))})
    assert backwards.rank_of(LoraTarget(target), layer) == rank


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
    told = json.loads((tmp_path / lora.CONFIG).read_text())
    mixer = "backbone.layers.{}.mixer.{}".format
    ranks = {mixer(1, "in_proj"): 3, mixer(1, "dt_proj"): 3, mixer(0, "out_proj"): 5, mixer(1, "out_proj"): 5}
    ranks |= {mixer(0, "x_proj"): 2, mixer(1, "x_proj"): 3, mixer(2, "x_proj"): 2, "w1": 7, "w2": 7}
    assert told["rank_pattern"] == ranks
    assert told["alpha_pattern"] == dict.fromkeys(ranks, 12.0)
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


def _config(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        data = json.loads((folder / lora.CONFIG).read_text())
        change(data)
        (folder / lora.CONFIG).write_text(json.dumps(data))

    return write


def _lora(**changed: Any) -> Callable[[Path], None]:
    return _config(lambda data: data["magellano"]["lora"].update(changed))


def _text(text: bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / lora.CONFIG).write_bytes(text) and None


def _become(make: Callable[[Path], object], name: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / name).rename(folder / "moved")
        make(folder / name)

    return replace


def _weights(change: Callable[[dict[str, mx.array]], object]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        tensors = dict(mx.load(str(folder / lora.WEIGHTS)))
        mx.eval(tensors)
        change(tensors)
        (folder / lora.WEIGHTS).unlink()
        mx.save_safetensors(str(folder / lora.WEIGHTS), tensors)

    return write


FIRST = "base_model.model.backbone.layers.0.mixer.in_proj.lora_A.weight"
HOSTILE: dict[str, tuple[Callable[[Path], None], str, str]] = {  # what it is: (how it is made, its file, what is said)
    "rank 10**12": (_lora(rank=10**12), lora.CONFIG, "rank 1000000000000 is more than 65,536"),
    "rank of 4,000 digits": (_lora(rank=10**4000), lora.CONFIG, "rank a number of 13288 bits is more than"),
    "a target's rank": (_lora(ranks={"x_proj": 10**9}), lora.CONFIG, "rank 1000000000 is more than 65,536"),
    "a layer's rank": (_lora(rank_pattern={"layers.1": 10**9}), lora.CONFIG, "rank 1000000000 is more than 65,536"),
    "a pattern of nothing": (_lora(rank_pattern={"(x+)+$": 3}), lora.CONFIG, "rank_pattern names '(x+)+$'"),
    "rank 0": (_lora(rank=0), lora.CONFIG, "rank: Input should be greater than 0 (got 0)"),
    "rank true": (_lora(rank=True), lora.CONFIG, "rank: Input should be a valid integer (got True)"),
    "rank text": (_lora(rank="4"), lora.CONFIG, "rank: Input should be a valid integer (got '4')"),
    "alpha NaN": (_lora(alpha=float("nan")), lora.CONFIG, "NaN is no number"),
    "alpha infinite": (_lora(alpha=float("-inf")), lora.CONFIG, "-Infinity is no number"),
    "an unknown target": (_lora(targets=["q_proj"]), lora.CONFIG, "targets.0: Input should be"),
    "targets a number": (_lora(targets=3), lora.CONFIG, "targets: Input should be a valid tuple (got 3)"),
    "no targets": (_lora(targets=[], ranks={}), lora.CONFIG, "targets is empty"),
    "an unknown key": (_lora(auto_mapping={}), lora.CONFIG, "auto_mapping: Extra inputs are not permitted"),
    "lora null": (_config(lambda d: d["magellano"].update(lora=None)), lora.CONFIG, "should be a valid dictionary"),
    "no lora": (_config(lambda d: d.pop("magellano")), lora.CONFIG, "'magellano' is missing"),
    "magellano a list": (_config(lambda d: d.update(magellano=[])), lora.CONFIG, "not an adapter made here"),
    "config deep": (_text(b'{"a":' * 100_000), lora.CONFIG, "nested too deep"),
    "config not UTF-8": (_text(b'{"a":"\xff"}'), lora.CONFIG, "not UTF-8 (byte 6)"),
    "config empty": (_text(b" "), lora.CONFIG, "not valid JSON"),
    "a key twice": (_text(b'{"r":1,"r":2}'), lora.CONFIG, "the key 'r' stands twice"),
    "config of 2 MB": (_text(b'{"a":"' + b"x" * (2 << 20) + b'"}'), lora.CONFIG, "more than the 1,048,576"),
    "config a FIFO": (_become(os.mkfifo, lora.CONFIG), lora.CONFIG, "a FIFO, not a regular file"),
    "config a link": (_become(lambda p: p.symlink_to("moved"), lora.CONFIG), lora.CONFIG, "a symbolic link"),
    "config a dangling link": (_become(lambda p: p.symlink_to("no"), lora.CONFIG), lora.CONFIG, "a symbolic link"),
    "weights a FIFO": (_become(os.mkfifo, lora.WEIGHTS), lora.WEIGHTS, "a FIFO, not a regular file"),
    "weights a link": (_become(lambda p: p.symlink_to("moved"), lora.WEIGHTS), lora.WEIGHTS, "a symbolic link"),
    "weights a folder": (_become(os.mkdir, lora.WEIGHTS), lora.WEIGHTS, "a folder, not a regular file"),
    "weights gone": (lambda f: (f / lora.WEIGHTS).unlink(), lora.WEIGHTS, "cannot be opened"),
    "weights a pickle": (lambda f: (f / lora.WEIGHTS).write_bytes(b"\x80\x04." * 9) and None, lora.WEIGHTS, "damaged"),
    "a tensor missing": (_weights(lambda t: t.pop(FIRST)), lora.WEIGHTS, f"tensor {FIRST} is missing"),
    "a tensor more": (_weights(lambda t: t.update(x=mx.zeros(3))), lora.WEIGHTS, "tensor x belongs to no target"),
    "transposed": (_weights(lambda t: t.update({FIRST: t[FIRST].T})), lora.WEIGHTS, "F32 (32, 4), should have shape"),
    "16 bits": (
        _weights(lambda t: t.update({FIRST: t[FIRST].astype(mx.float16)})), lora.WEIGHTS,
        f"tensor {FIRST} is F16 (4, 32)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_adapter_is_refused(tmp_path: Path, what: str) -> None:
    """One line with file, place and remedy; MLX has allocated nothing."""
    lora.save(tmp_path, SMALL, LORA, trained(), base="../../quantize/x")
    make, file, said = HOSTILE[what]
    make(tmp_path)
    active = mx.get_active_memory()
    with pytest.raises(InputError) as refused:
        lora.load(tmp_path, SMALL)
    text = str(refused.value)
    assert text.startswith(str(tmp_path / file) + ":"), text
    assert said in text
    remedies = (lora.REMEDY, headers.REMEDY, "put the file itself in its place", "use it with the model that")
    assert any(remedy in text for remedy in remedies), text
    assert text.isprintable(), ascii(text)
    assert len(text) < 900
    assert mx.get_active_memory() <= active


BASES: dict[str, tuple[Any, str]] = {
    "none": ("", "names no base"),
    "null": (None, "names no base"),
    "a number": (7, "names no base"),
    "a list": (["../../quantize/x"], "names no base"),
    "absolute": ("/etc", "leaves the artifact store"),
    "itself": (".", "leaves the artifact store"),
    "its own name": ("../release", "leaves the artifact store"),
    "upwards": ("../../../x", "leaves the artifact store"),
    "through the store": ("../../quantize/../../../x", "leaves the artifact store"),
    "dots as a key": ("../../quantize/..", "leaves the artifact store"),
    "no key": ("../../quantize/", "leaves the artifact store"),
    "no stage": ("../../models/x", "leaves the artifact store"),
    "a hub's name": ("some-one/some-model", "leaves the artifact store"),
    "a URL": ("https://127.0.0.1/x", "leaves the artifact store"),
    "home": ("~/x", "leaves the artifact store"),
    "NUL": ("../../quantize/a\0b", "leaves the artifact store"),
    "a Windows path": ("../../quantize/a\\..\\b", "leaves the artifact store"),
    "a line break": ("../../quantize/a\nb", "leaves the artifact store"),
    "a long name": ("../../quantize/" + "x" * 100_000, "leaves the artifact store"),
    "a link": ("../../quantize/link", "goes through a symbolic link"),
    "a loop of links": ("../../quantize/loop", "a symbolic link"),
    "not there": ("../../quantize/gone", "is not there"),
    "an adapter": ("../../checkpoint/other", "is an adapter itself"),
    "itself through the store": ("../../checkpoint/release", "is an adapter itself"),
}


@pytest.mark.parametrize("what", BASES)
def test_a_base_elsewhere_is_refused(tmp_path: Path, what: str) -> None:
    """A release leads to a base of its own store and nowhere else, not even through a link to a sound one."""
    base, said = BASES[what]
    release, store = tmp_path / "checkpoint" / "release", tmp_path / "quantize"
    for folder in (release, release.with_name("other"), store / "x"):
        folder.mkdir(parents=True)
    loader.write_model(store / "x", SMALL, loader.dense_tensors(MagellanoLM(SMALL, seeded(0))), quantized=False)
    (store / "link").symlink_to("x")
    (store / "loop").symlink_to("loop")
    for folder in (release, release.with_name("other")):
        lora.save(folder, SMALL, LORA, trained(), base="../../quantize/x")
    assert loader.load_model(release, "float32")(TOKENS).shape == (2, 13, 300)
    _config(lambda data: data.update(base_model_name_or_path=base))(release)
    with pytest.raises(InputError) as refused:
        loader.load_model(release, "float32")
    text = str(refused.value)
    assert text.startswith(str(release))
    assert said in text
    assert text.isprintable(), ascii(text)
    assert len(text) < 500
