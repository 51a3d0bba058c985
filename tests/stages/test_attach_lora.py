"""An adapter that starts from what quantising lost, in the store's chain of artifacts; where the weights come from."""

from pathlib import Path

import numpy as np
import pytest

from magellano import loader, loftq, lora, pipeline
from magellano.artifacts import ArtifactRef, Store
from magellano.backend import mx
from magellano.errors import InputError
from magellano.layout import ParamSpec, parameters
from magellano.merge import pieces
from magellano.model import MagellanoLM, seeded
from magellano.names import LoraKind, Stage
from magellano.profile import LoraConfig, ModelConfig, Profile, load_profile
from magellano.progress import silent
from magellano.stages import attach_lora, quantize
from magellano.tokenizer import Tokenizer
from tests.tiny import MODEL

TOKENS = mx.array(np.random.default_rng(0).integers(0, 300, (2, 40)))
RANKS = {"rank": 12, "ranks": {"w1": 8, "dt_proj": 6}, "init": "loftq"}


def weights(spec: ParamSpec) -> mx.array:
    """Sharper than initial ones, so that what is lost shows."""
    w = seeded(4)(spec)
    assert isinstance(w, mx.array)
    return w * (6.0 if spec.name == "backbone.embeddings.weight" else 1.5 if spec.target else 1.0)


def profile(folder: Path, source: str, embedding: bool = True, init: str = "loftq") -> Profile:
    path = folder / "tiny.toml"
    path.write_text(MODEL + '[data]\nfiles = ["x.txt"]\n[train]\nsteps = 10\n[pretrain.data]\nfiles = ["x.txt"]\n'
                    "[pretrain.train]\nsteps = 10\n")  # fmt: skip
    where = {"base.folder": str(folder / "dense")} if source == "folder" else {}
    more = {f"lora.{key}": value for key, value in {**RANKS, "init": init}.items()}
    return load_profile(path, {"base.source": source, "quantize.embedding": embedding, **where, **more})


def write_dense(folder: Path, config: ModelConfig) -> None:
    folder.mkdir(exist_ok=True)
    loader.write_model(folder, config, ((s.name, weights(s)) for s in parameters(config)), quantized=False)
    Tokenizer(config.vocab_size).save(folder)


def build(store: Store, stage: Stage, make, **inputs) -> ArtifactRef:  # type: ignore[no-untyped-def]
    return store.build(stage, f"{stage}-key", version=1, inputs=inputs, config={}, make=make).ref


@pytest.fixture(params=["seeded", "pretrain", "folder"])
def chain(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Profile, Path]:
    """A profile and its quantised base, with the dense one where that comes from."""
    store, p, inputs = Store(tmp_path / "home"), profile(tmp_path, request.param), {}
    write_dense(tmp_path / "dense", p.model)
    dense: Path | None = tmp_path / "dense"
    if request.param == "folder":
        inputs["base"] = pipeline.base_digest(p)
    elif request.param == "pretrain":
        inputs["base"] = build(store, Stage.PRETRAIN, lambda out: write_dense(out, p.model) or {})
    else:
        dense = None
    base = build(store, Stage.QUANTIZE, lambda out: quantize.run(out, p, dense, silent), **inputs)
    return p, store.path(base)


def test_it_starts_nearer_to_the_dense_model(chain: tuple[Profile, Path], tmp_path: Path) -> None:
    """Every matrix is, by its norm; and so are the predictions: their loss on what the dense model says."""
    p, base = chain
    facts = attach_lora.run(tmp_path, p, base)
    assert facts["quantization_error_left"] < 0.8 * facts["quantization_error"]
    source = weights if p.base.source != "seeded" else seeded(p.base.seed)
    dense, plain, started = MagellanoLM(p.model, source), loader.load_model(base, "float32"), loader.load_model(base)
    settings, tensors = lora.load(tmp_path, p.model)
    assert settings == p.lora
    lora.attach(started, settings, tensors)
    lost = {"before": 0.0, "after": 0.0}
    for spec in (spec for spec in parameters(p.model) if spec.target is not None):
        path = lora.module_path(spec)
        for w, q, near in zip(*(pieces(lora.find(m, path)) for m in (dense, plain, started)), strict=True):
            before, after = (float(mx.linalg.norm(w - x)) for x in (q, near))
            assert after < 0.98 * before, path
            lost["before"] += before**2
            lost["after"] += after**2
    assert facts["quantization_error"] == pytest.approx(lost["before"] ** 0.5, rel=1e-4)
    assert facts["quantization_error_left"] == pytest.approx(lost["after"] ** 0.5, rel=1e-4)
    logits = (model(TOKENS) for model in (dense, plain, started))
    log_p, log_q, log_s = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in logits)
    best, quantized, loss = (float(-(mx.exp(log_p) * x).sum(axis=-1).mean()) for x in (log_p, log_q, log_s))
    assert loss - best < 0.7 * (quantized - best)


def test_the_same_seed_starts_the_same_and_the_stored_base_stays(tmp_path: Path) -> None:
    p = profile(tmp_path, "seeded")
    base, outs = tmp_path / "base", [tmp_path / "a", tmp_path / "b"]
    for folder in (base, *outs):
        folder.mkdir()
    quantize.run(base, p, None, silent)
    before = {f.name: f.read_bytes() for f in base.iterdir()}
    for out in outs:
        attach_lora.run(out, p, base)
    assert (outs[0] / lora.WEIGHTS).read_bytes() == (outs[1] / lora.WEIGHTS).read_bytes()
    assert {f.name: f.read_bytes() for f in base.iterdir()} == before


def test_with_dora_the_rows_have_the_lengths_of_what_they_start_as(tmp_path: Path) -> None:
    p = profile(tmp_path, "seeded")
    dora = LoraConfig(kind="dora", init="loftq", rank=6, targets=("in_proj", "w1", "w2"))
    plain = dora.model_copy(update={"kind": LoraKind.LORA})
    folders = [tmp_path / name for name in ("base", "dora", "plain")]
    for folder in folders:
        folder.mkdir()
    quantize.run(folders[0], p, None, silent)
    weights = []
    for folder, settings in zip(folders[1:], (dora, plain), strict=True):
        attach_lora.run(folder, p.model_copy(update={"lora": settings}), folders[0])
        model = loader.load_release(folder, folders[0])
        weights.append([w for path in ("0.mixer.in_proj", "3.mixer.experts.w2")
                        for w in pieces(lora.find(model, f"backbone.layers.{path}"))])  # fmt: skip
    for one, other in zip(*weights, strict=True):
        assert mx.allclose(one, other, rtol=1e-4, atol=1e-6).item()


def test_what_is_not_quantised_starts_as_without(tmp_path: Path) -> None:
    p = profile(tmp_path, "seeded", embedding=False)
    quantize.run(tmp_path, p, None, silent)
    attach_lora.run(tmp_path, p, tmp_path)
    _, tensors = lora.load(tmp_path, p.model)
    plain = lora.start(p.model, p.lora)
    for part in ("lora_a", "lora_b"):
        name = f"backbone.embeddings.{part}"
        assert mx.array_equal(tensors[name], plain[name]).item()
    # dt_proj has 4 columns and rank 6: two rows of A wait for training as they would without
    a, b = (tensors[f"backbone.layers.0.mixer.dt_proj.{part}"] for part in ("lora_a", "lora_b"))
    assert mx.array_equal(a[4:], plain["backbone.layers.0.mixer.dt_proj.lora_a"][4:]).item()
    assert not mx.any(b[:, 4:]).item()
    assert mx.any(b[:, :4]).item()


def test_weights_that_are_gone_are_refused(tmp_path: Path) -> None:
    store = Store(tmp_path / "home")
    p = profile(tmp_path, "folder")
    write_dense(tmp_path / "dense", p.model)
    digest = pipeline.base_digest(p)
    base = build(store, Stage.QUANTIZE, lambda out: quantize.run(out, p, tmp_path / "dense", silent), base=digest)
    (tmp_path / "dense" / "README.md").write_text("another model")
    with pytest.raises(InputError, match="holds others now; run the quantize stage again, or set"):
        attach_lora.run(tmp_path, p, store.path(base))
    with pytest.raises(InputError, match="is not in the store any more; run the pretrain stage again"):
        attach_lora.run(tmp_path, profile(tmp_path, "pretrain"), store.path(base))


@pytest.mark.parametrize("shape", [(300, 280), (280, 300)])
def test_a_random_svd_is_nearly_the_best(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=shape).astype(np.float32)  # the hardest: no singular value stands out
    for r, worst in ((noise, 1.01), (noise + 20 * np.outer(rng.normal(size=shape[0]), np.ones(shape[1])), 1.01)):
        r = r.astype(np.float32)
        u, s, v = loftq.factors(r, 8, rng)
        assert u.shape == (shape[0], 8)
        assert v.shape == (8, shape[1])
        np.testing.assert_allclose(u.T @ u, np.eye(8), atol=1e-4)
        exact = np.linalg.svd(r, compute_uv=False)
        best = np.sqrt((exact[8:] ** 2).sum())
        assert np.linalg.norm(r - (u * s) @ v) < worst * best
        assert np.linalg.norm(r - (u * s) @ v) < np.linalg.norm(r)
