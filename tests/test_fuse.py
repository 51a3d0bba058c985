"""Fusing on a tiny real release in a store: what it keeps, what it measures, what it refuses."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magellano import cli, fuse, loader, lora, merge, nf4
from magellano.artifacts import Store
from magellano.backend import mx
from magellano.data.shards import Batch, Rows, write_facts, write_split
from magellano.names import METRICS, Stage
from magellano.nf4 import NF4Stack, NF4Tensor
from magellano.profile import load_profile
from magellano.progress import silent
from magellano.stages import checkpoint, quantize
from tests import models

PROFILE = """
[model]
d_model = 64
n_layers = 4
n_experts = 4
d_ff = 64
d_state = 4
dt_rank = 4
vocab_size = 300
[data]
format = "text"
files = ["unused.jsonl"]
seq_len = 32
[lora]
rank = 4
[train]
steps = 2
warmup = 0
compute = "float32"
[evaluate]
batch = 8
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuse")
    (folder / "tiny.toml").write_text(PROFILE, encoding="utf-8")
    profile, store = load_profile(folder / "tiny.toml"), Store(folder / "home")

    def build(stage: Stage, make: Any, **inputs: Any) -> Any:
        return store.build(stage, f"{stage}-key", version=1, inputs=inputs, config={}, make=make).ref

    def tokens(out: Path) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        for split, rows in (("train", 40), ("held_out", 12)):
            made = rng.integers(0, 299, (rows, 33)).astype(np.uint16)
            flags = np.ones((rows, 32), dtype=np.uint8)
            reset = np.zeros((rows, 32), dtype=np.uint8)
            write_split(out, split, [Rows(made[:, :-1], made[:, 1:], flags, reset)])
        write_facts(out, vocab_size=300, seq_len=32, rows={"train": 40, "held_out": 12}, end_of_text=299)
        return {}

    def train(out: Path) -> dict[str, Any]:
        lora.save(out, profile.model, profile.lora, models.adapter(profile.model, profile.lora))
        (out / METRICS).write_text("")
        return {}

    token_ref = build(Stage.TOKENIZE, tokens)
    base_ref = build(Stage.QUANTIZE, lambda out: quantize.run(out, profile, None, silent))
    trained = build(Stage.TRAIN, train)
    places = [store.path(ref) for ref in (trained, base_ref, token_ref)]
    inputs = {"tokens": token_ref, "base": base_ref, "trained": trained}
    build(Stage.CHECKPOINT, lambda out: checkpoint.run(out, profile, *places, {}), **inputs)
    return folder / "home"


@pytest.fixture(autouse=True)
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGELLANO_HOME", str(home))


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    code = cli.main(["fuse", "tiny", *argv, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def release(home: Path) -> Any:
    store = home / "artifacts"
    return loader.load_release(store / "checkpoint/checkpoint-key", store / "quantize/quantize-key", "float32")


def test_in_16_bits_it_is_base_and_adapter(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    facts = call(capsys, str(tmp_path / "out"), "--dtype", "float16")
    model = release(home)
    tokens = mx.array(np.random.default_rng(1).integers(0, 300, (2, 20)))
    wanted, got = model(tokens), loader.load_model(tmp_path / "out", "float32")(tokens)
    with fuse.without_adapters(model):
        plain = model(tokens)
        mx.eval(plain)
    assert mx.array_equal(model(tokens), wanted).item()
    assert mx.linalg.norm(got - wanted).item() <= 0.02 * mx.linalg.norm(wanted - plain).item()
    assert facts["tokens"] == 12 * 32
    assert abs(facts["loss_fused"] - facts["loss_adapted"]) < 0.001
    assert 0 <= facts["divergence_fused"] < 0.001 < facts["divergence_base"]
    assert cli.main(["generate", str(tmp_path / "out"), "--prompt", "x", "--max-tokens", "2"]) == 0


def test_in_4_bits_the_error_is_carried_on(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    facts = call(capsys, str(tmp_path / "out"), "--bits", "4", "--bound", "10", "--calibration", "1000")
    model, nearest = loader.load_model(tmp_path / "out", "float32"), release(home)
    bases = [m.base for _, m in model.named_modules() if hasattr(m, "lora_scale")]
    assert all(isinstance(base, NF4Tensor | NF4Stack) for base in bases)
    assert facts["error_share"] < 0.8 * facts["error_share_nearest"]
    assert facts["divergence_fused"] < facts["divergence_base"]
    # the same merge, rounded to nearest, is further away
    for _, module in nearest.named_modules():
        if hasattr(module, "lora_scale"):
            made = [nf4.quantize(w) for w in merge.pieces(module)]
            module.quantized = NF4Stack.of(made) if isinstance(module.base, NF4Stack) else made[0]
            del module.lora_a, module.lora_b
    held_out = list(held(home))
    adapted = release(home)
    by_nearest = fuse.cost(adapted, nearest, iter(held_out))
    assert facts["divergence_fused"] < by_nearest.divergence_fused


def held(home: Path) -> Any:
    from magellano.commands.fuse import batches
    from magellano.data.shards import Shards

    return batches(Shards(home / "artifacts/tokenize/tokenize-key", "held_out"), 8, 0)


@pytest.mark.parametrize("bits", ["4", "16"])
def test_beyond_the_bound_nothing_is_written(bits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["fuse", "tiny", str(tmp_path / "out"), "--bits", bits, "--bound", "1e-9"]) == 2
    err = capsys.readouterr().err
    assert "more than the bound 1e-09" in err
    assert "or raise --bound" in err
    assert list(tmp_path.iterdir()) == []


def test_the_cost_is_what_it_says(home: Path):
    """Against a plain loop in float64."""
    model, other = release(home), models.quantized(release(home).config, seed=9)
    batch = next(held(home))
    weights = batch.weights.copy()
    weights[:, :20] = 0
    cost = fuse.cost(model, other, iter([Batch(batch.tokens, batch.targets, weights, batch.reset)]))
    log_p = []
    for m in (model, other):
        logits = np.array(m(mx.array(batch.tokens), mx.array(batch.reset)), dtype=np.float64)[:, 20:].reshape(-1, 300)
        log_p.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    targets = batch.targets[:, 20:].reshape(-1)
    losses = [-p[np.arange(len(targets)), targets].mean() for p in log_p]
    assert (cost.loss_adapted, cost.loss_fused) == pytest.approx(losses, rel=1e-4)
    assert cost.divergence_fused == pytest.approx(
        (np.exp(log_p[0]) * (log_p[0] - log_p[1])).sum(axis=1).mean(), rel=1e-3
    )
    assert cost.tokens == len(targets)
    assert cost.too_much(1e-6)
    assert cost.too_much(100) is None


def test_what_does_not_go_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert cli.main(["fuse", "tiny", str(tmp_path / "out"), "--bound", "0"]) == 2
    assert "--bound" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    assert cli.main(["fuse", "tiny", str(tmp_path / "full")]) == 2
    assert "something already" in capsys.readouterr().err
