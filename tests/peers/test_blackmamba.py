"""`magellano import` of a BlackMamba against its published formulas (arXiv 2402.01771), in plain torch."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magellano import blackmamba, cli, loader
from magellano.backend import mx
from magellano.backprop import Backprop, Batch
from magellano.errors import InputError
from magellano.generate import generate
from magellano.hf_tokenizer import save
from magellano.layout import parameters
from magellano.model import MagellanoLM
from magellano.tokenizer import Tokenizer

torch = pytest.importorskip("torch", reason="pip install -r requirements-peers.lock")
pytest.importorskip("tokenizers", reason="pip install -r requirements-peers.lock")

D, EXPAND, N, K, F, V, E = 40, 2, 5, 4, 24, 300, 4
LAYERS = ["r", str(E), "r", str(E)]
CONFIG = {
    "num_layers": len(LAYERS), "hidden_size": D, "state_size": N, "conv_dimension": K, "vocab_size": V,
    "expansion_factor": EXPAND, "mamba_moe_layers": LAYERS, "ffn_hidden_size": F, "add_bias_linear": False,
    "swiglu": True, "max_sequence_length": 2048,
}  # fmt: skip


def state_dict() -> dict[str, Any]:
    torch.manual_seed(0)
    inner, rank = EXPAND * D, -(-D // 16)
    shapes = {"embedding.word_embeddings.weight": (V, D)}
    shapes |= {f"decoder.final_layernorm.{p}": (D,) for p in ("weight", "bias")}
    for n, kind in enumerate(LAYERS):
        at = f"decoder.layers.{n}"
        shapes[f"{at}.norm.weight"] = (D,)
        if kind == "r":
            shapes |= {
                f"{at}.mixer.in_proj.weight": (2 * inner, D), f"{at}.mixer.conv1d.weight": (inner, 1, K),
                f"{at}.mixer.conv1d.bias": (inner,), f"{at}.mixer.x_proj.weight": (rank + 2 * N, inner),
                f"{at}.mixer.dt_proj.weight": (inner, rank), f"{at}.mixer.dt_proj.bias": (inner,),
                f"{at}.mixer.A_log": (inner, N), f"{at}.mixer.D": (inner,), f"{at}.mixer.out_proj.weight": (D, inner),
            }  # fmt: skip
            continue
        shapes |= {f"{at}.mixer.router.weight": (E, D), f"{at}.mixer.router.bias": (E,)}
        for e in range(E):
            shapes[f"{at}.mixer.local_experts.{e}.linear_fc1.weight"] = (2 * F, D)
            shapes[f"{at}.mixer.local_experts.{e}.linear_fc2.weight"] = (D, F)
    return {
        name: 0.3 * torch.randn(shape) + (1.0 if "norm" in name and "bias" not in name else 0.0)
        for name, shape in shapes.items()
    }


def logits(sd: dict[str, Any], tokens: np.ndarray, act: Any) -> Any:
    """[B, T, V], each formula as the paper and those it builds on have it, token by token."""
    silu, h = torch.nn.functional.silu, sd["embedding.word_embeddings.weight"][torch.from_numpy(tokens)]
    for n, kind in enumerate(LAYERS):
        p = {k.removeprefix(f"decoder.layers.{n}."): v for k, v in sd.items() if k.startswith(f"decoder.layers.{n}.")}
        u = h / (h.square().mean(-1, keepdim=True) + 1e-5).sqrt() * p["norm.weight"]
        p = {k.removeprefix("mixer."): v for k, v in p.items()}
        h = h + (mamba(p, u, silu) if kind == "r" else mixture(p, u, act))
    mean, variance = h.mean(-1, keepdim=True), h.var(-1, unbiased=False, keepdim=True)
    h = (h - mean) / (variance + 1e-5).sqrt()
    h = h * sd["decoder.final_layernorm.weight"] + sd["decoder.final_layernorm.bias"]
    return h @ sd["embedding.word_embeddings.weight"].T


def mamba(p: dict[str, Any], u: Any, silu: Any) -> Any:
    x, z = (u @ p["in_proj.weight"].T).chunk(2, -1)
    past = torch.cat([torch.zeros(x.shape[0], K - 1, x.shape[2]), x], 1)
    x = silu(sum(past[:, k : k + x.shape[1]] * p["conv1d.weight"][:, 0, k] for k in range(K)) + p["conv1d.bias"])
    dt, b, c = (x @ p["x_proj.weight"].T).split([p["dt_proj.weight"].shape[1], N, N], -1)
    dt = torch.nn.functional.softplus(dt @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    state, y = torch.zeros(x.shape[0], x.shape[2], N), []
    for t in range(x.shape[1]):
        state = torch.exp(dt[:, t, :, None] * -torch.exp(p["A_log"])) * state
        state = state + (dt[:, t] * x[:, t])[..., None] * b[:, t, None]
        y.append((state * c[:, t, None]).sum(-1) + p["D"] * x[:, t])
    return (torch.stack(y, 1) * silu(z)) @ p["out_proj.weight"].T


def mixture(p: dict[str, Any], u: Any, act: Any) -> Any:
    out = torch.zeros_like(u)
    for index in np.ndindex(tuple(u.shape[:2])):
        route = torch.sigmoid(p["router.weight"] @ u[index] + p["router.bias"])
        e = int(route.argmax())
        a, b = (p[f"local_experts.{e}.linear_fc1.weight"] @ u[index]).chunk(2)
        out[index] = route[e] * (p[f"local_experts.{e}.linear_fc2.weight"] @ (act(a) * b))
    return out


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "theirs"
    made.mkdir()
    (made / "config.json").write_text(json.dumps(CONFIG))
    torch.save({"model": state_dict()}, made / blackmamba.WEIGHTS)
    save(made, Tokenizer(V), chat=False)
    return made


@pytest.mark.parametrize("glu", ["silu", "gelu"])
def test_logits_are_those_of_the_formulas(glu: str, folder: Path, tmp_path: Path):
    assert cli.main(["import", str(folder), str(tmp_path / "ours"), "--glu", glu]) == 0
    model = loader.load_model(tmp_path / "ours", "float32")
    tokens = np.random.default_rng(0).integers(0, V, (2, 40))
    wanted = logits(state_dict(), tokens, getattr(torch.nn.functional, glu)).numpy()
    assert np.abs(wanted).max() > 1
    np.testing.assert_allclose(np.array(model(mx.array(tokens))), wanted, atol=1e-3)
    decoder, state = model.decoder(), model.initial_state(2)
    for t in range(6):
        got, state = decoder(mx.array(tokens[:, t]), state)
        np.testing.assert_allclose(np.array(got), wanted[:, t], atol=1e-3)
    (first,) = generate(model, tokens[0, 1:9].tolist(), int(tokens[0, 0]), 1)
    assert first == wanted[0, 8].argmax()
    counts = model.expert_counts(mx.array(tokens), mx.zeros((2, 40), mx.uint8))
    assert [sum(each) for each in counts] == [80, 80]
    assert all(len([n for n in each if n]) > 1 for each in counts)


@pytest.mark.parametrize("glu", ["silu", "gelu"])
def test_gradients_are_those_of_the_formulas(glu: str, folder: Path):
    """Of every parameter, embedding and router with its bias included: what is imported can be trained on."""
    there = blackmamba.read(folder, glu)
    model = MagellanoLM(there.config, there.source())
    tokens = np.random.default_rng(1).integers(0, V, (2, 13))
    held = {name: value.requires_grad_() for name, value in state_dict().items()}
    found = logits(held, tokens[:, :-1], getattr(torch.nn.functional, glu)).reshape(-1, V)
    loss = torch.nn.functional.cross_entropy(found, torch.from_numpy(tokens[:, 1:]).reshape(-1))
    loss.backward()
    inputs, targets = mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:])
    batch = Batch(inputs, targets, mx.ones(inputs.shape), mx.zeros(inputs.shape, mx.uint8))
    ours = Backprop(model)(batch, 1 / inputs.size)
    assert ours.nll.item() / inputs.size == pytest.approx(loss.item(), rel=1e-4)
    for spec in parameters(there.config):
        theirs = [held[name].grad for name in blackmamba.theirs(spec)]
        wanted = (torch.stack(theirs) if len(theirs) > 1 else theirs[0]).numpy()
        got = np.array(ours.gradients[spec.name])
        assert np.linalg.norm(got - wanted) <= 1e-3 * np.linalg.norm(wanted), spec.name


def test_16_bit_files_stay_as_they_are(folder: Path):
    held = state_dict()
    torch.save({"model": {k: v.bfloat16() for k, v in held.items()}}, folder / blackmamba.WEIGHTS)
    there = blackmamba.read(folder, "silu")
    take = there.source()
    for spec in parameters(there.config):
        value = take(spec)
        assert value.dtype == mx.bfloat16
        names = blackmamba.theirs(spec)
        wanted = torch.stack([held[n] for n in names]) if len(names) > 1 else held[names[0]]
        assert np.array_equal(np.array(value.astype(mx.float32)), wanted.bfloat16().float().numpy()), spec.name


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda held: {**held, "decoder.extra": torch.zeros(1)}, "decoder.extra.* belongs to no parameter"),
        (lambda held: {k: v for k, v in held.items() if "fc2" not in k}, r"linear_fc2\.weight is missing"),
        (lambda held: {k: v[:-1] for k, v in held.items()}, "has shape"),
        (lambda held: {k: v.long() for k, v in held.items()}, "float tensors"),
        (lambda held: {**held, "args": CONFIG}, "float tensors"),
        (lambda held: {**held, "run": Path("x")}, "torch does not read it as tensors alone"),
    ],
)
def test_what_is_not_its_tensors_is_refused(change: Any, told: str, folder: Path):
    torch.save({"model": change(state_dict())}, folder / blackmamba.WEIGHTS)
    with pytest.raises(InputError, match=told):
        blackmamba.read(folder, "silu").source()


def test_a_file_that_is_none(folder: Path):
    for content in (b"", b"x" * 100, (folder / blackmamba.WEIGHTS).read_bytes()[:500]):
        (folder / blackmamba.WEIGHTS).write_bytes(content)
        with pytest.raises(InputError, match="tensors alone"):
            blackmamba.read(folder, "gelu").source()
