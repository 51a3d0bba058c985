"""Growing experts changes no logit, keeps what was trained, and refuses what cannot be grown."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magellano import cli, foreign, loader, upcycle
from magellano.backend import mx
from magellano.layout import parameters
from magellano.model import MagellanoLM, seeded
from magellano.names import LayerKind
from magellano.profile import ModelConfig
from tests import models

DENSE = ModelConfig(**foreign.dense(6), d_model=16, d_state=4, dt_rank=3, vocab_size=300)
TOKENS = mx.array(np.random.default_rng(0).integers(0, 300, (2, 25)))


def shape(old: ModelConfig, **changes: Any) -> ModelConfig:
    return ModelConfig.model_validate({**old.model_dump(), **changes})


def grow(model: MagellanoLM, new: ModelConfig, seed: int = 0) -> MagellanoLM:
    upcycle.check(model.config, new)
    flat = dict(loader.dense_tensors(model))
    weights = dict(upcycle.tensors(model.config, new, lambda spec: flat[spec.name], seed))
    assert [(name, tuple(value.shape)) for name, value in weights.items()] == [
        (s.name, s.shape) for s in parameters(new)
    ]
    return MagellanoLM(new, lambda spec: weights[spec.name])


def near(a: mx.array, b: mx.array) -> bool:
    return mx.abs(a - b).max().item() <= 1e-5 * mx.abs(b).max().item()


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (4, 2)])
def test_a_dense_model_grows_feed_forwards_that_say_nothing_yet(experts: int, top_k: int):
    model = MagellanoLM(DENSE, seeded(1))
    new = shape(DENSE, n_layers=8, moe_every=4, n_experts=experts, top_k=top_k, d_ff=24)
    grown = grow(model, new)
    assert [new.kind(layer) is LayerKind.MOE for layer in range(8)] == [False, False, False, True] * 2
    assert near(grown(TOKENS), model(TOKENS))
    first = dict(loader.dense_tensors(grown))["backbone.layers.3.mixer.experts.w1.weight"]
    assert mx.abs(first).min(axis=(1, 2)).max().item() > 0
    assert len({first[e].sum().item() for e in range(experts)}) == experts  # so that they drift apart


def test_a_trained_feed_forward_becomes_experts():
    one = ModelConfig(d_model=16, n_layers=4, n_experts=1, top_k=1, d_ff=24, d_state=4, dt_rank=3, vocab_size=300)
    model = MagellanoLM(one, seeded(1))
    for top_k in (1, 2, 4):
        grown = grow(model, shape(one, n_experts=4, top_k=top_k))
        assert near(grown(TOKENS), model(TOKENS))
    a, b = (dict(loader.dense_tensors(m)) for m in (grown, model))
    for name in ("w1", "w2"):
        name = f"backbone.layers.3.mixer.experts.{name}.weight"
        assert all(mx.array_equal(a[name][e], b[name][0]).item() for e in range(4))
    routers = [dict(loader.dense_tensors(grow(model, shape(one, n_experts=4), seed))) for seed in (0, 0, 1)]
    routers = [r["backbone.layers.3.mixer.router.weight"] for r in routers]
    assert mx.array_equal(routers[0], routers[1]).item()
    assert not mx.array_equal(routers[0], routers[2]).item()


def test_fewer_layers_are_spread_over_the_old_ones():
    new = shape(DENSE, n_layers=4, moe_every=4, n_experts=2, top_k=1, d_ff=8)
    grown = dict(loader.dense_tensors(grow(MagellanoLM(DENSE, seeded(1)), new)))
    old = dict(loader.dense_tensors(MagellanoLM(DENSE, seeded(1))))
    for layer, source in {0: 0, 1: 2, 2: 5}.items():
        name = "backbone.layers.{}.mixer.in_proj.weight"
        assert mx.array_equal(grown[name.format(layer)], old[name.format(source)]).item()


@pytest.mark.parametrize(
    ("old", "changes", "told"),
    [
        (DENSE, {"n_layers": 9, "moe_every": 4, "n_experts": 2, "d_ff": 8}, "lower layers"),
        (DENSE, {"moe_every": 4, "d_model": 32}, "d_model"),
        (DENSE, {"n_layers": 4, "moe_every": 5}, "no experts"),
        (models.TINY, {"n_experts": 8}, "4 experts already"),
        (models.TINY, {"n_experts": 8, "d_ff": 32}, "keeps"),
    ],
)
def test_what_cannot_grow(old: ModelConfig, changes: dict[str, Any], told: str):
    with pytest.raises(ValueError, match=told):
        upcycle.check(old, shape(old, **changes))


def test_the_command_line_grows_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    model = models.write(tmp_path / "dense", DENSE)
    argv = ["import", str(tmp_path / "dense")]
    assert cli.main([*argv, str(tmp_path / "moe"), "--experts", "3", "--d-ff", "8", "--json"]) == 0
    assert '"n_layers": 8' in capsys.readouterr().out
    assert near(loader.load_model(tmp_path / "moe", "float32")(TOKENS), model(TOKENS))
    for more, told in (
        ([str(tmp_path / "x")], "already"),
        ([str(tmp_path / "x"), "--experts", "0"], "n_experts"),
        ([str(tmp_path / "x"), "--experts", "2", "--layers", "12"], "lower layers"),
        ([str(tmp_path / "moe"), "--experts", "2", "--d-ff", "8"], "something already"),
    ):
        assert cli.main([*argv, *more]) == 2
        assert told in capsys.readouterr().err
    assert cli.main(["import", str(tmp_path / "moe"), str(tmp_path / "x"), "--experts", "4", "--d-ff", "8"]) == 2
    assert not (tmp_path / "x").exists()
