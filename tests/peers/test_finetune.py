"""A model of transformers with its own tokenizer: imported, grown, fine-tuned, evaluated; every stage in its tokens."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magellano import cli, durable, loader, pipeline
from magellano.artifacts import Store
from magellano.backend import mx
from magellano.data.shards import Shards
from magellano.hf_tokenizer import FILE, Foreign
from magellano.names import LoraTarget, Stage
from magellano.profile import Profile, load_profile
from magellano.progress import silent
from magellano.stages import attach_lora, checkpoint, evaluate, quantize, tokenize, train
from magellano.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="pip install -r requirements-peers.lock")
torch = pytest.importorskip("torch", reason="pip install -r requirements-peers.lock")
tokenizers = pytest.importorskip("tokenizers", reason="pip install -r requirements-peers.lock")

WORDS = ["hello", "world", "again", "and", "the", "other", "one", "two", "three"]


@pytest.fixture(scope="module", params=["tied, grown", "a head of its own, normed"])
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("foreign")
    torch.manual_seed(0)
    sizes = {"vocab_size": 320, "hidden_size": 32, "state_size": 4, "num_hidden_layers": 3, "time_step_rank": 3}
    if request.param.startswith("tied"):
        model, grow = (
            transformers.MambaForCausalLM(transformers.MambaConfig(**sizes)),
            ["--experts", "4", "--d-ff", "48"],
        )
    else:
        config = transformers.FalconMambaConfig(**sizes, tie_word_embeddings=False)
        model, grow = transformers.FalconMambaForCausalLM(config), []
    model.save_pretrained(folder / "theirs")
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|padding|>"]
    made.train_from_iterator(
        [" ".join(WORDS)] * 9,
        tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet),
    )
    made.save(str(folder / "theirs" / FILE))
    assert cli.main(["import", str(folder / "theirs"), str(folder / "base"), *grow]) == 0
    return folder / "base"


def profile_for(base: Path, folder: Path) -> Profile:
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": " ".join(rng.choice(WORDS, 12))}) for _ in range(60)]
    (folder / "data.jsonl").write_text("\n".join(lines))
    config, _ = loader.read_config(base)
    targets = [t for t in LoraTarget if config.tied or t is not LoraTarget.HEAD]
    return load_profile(
        "demo",
        {
            "model": config.model_dump(), "base": {"source": "folder", "folder": str(base)},
            "data": {"format": "text", "files": [str(folder / "data.jsonl")], "seq_len": 32, "held_out": 0.2},
            "lora": {"rank": 4, "targets": targets},
            "train": {"steps": 12, "batch": 4, "lr": 1e-2, "warmup": 2}, "evaluate": {"samples": 1, "sample_tokens": 4},
        },
    )  # fmt: skip


def test_it_is_fine_tuned_in_its_own_tokens(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("MAGELLANO_HOME", str(tmp_path / "home"))
    profile, store = profile_for(base, tmp_path), Store(tmp_path / "home")

    def build(stage: Stage, make: Any, **inputs: Any) -> Any:
        settings = pipeline.settings(stage, profile, profile.data if stage is Stage.TOKENIZE else None)
        return store.build(stage, f"{stage}-key", version=1, inputs=inputs, config=settings, make=make).ref

    ours = pipeline.tokenizer(profile)
    assert isinstance(ours, Foreign)
    token_ref = build(Stage.TOKENIZE, lambda out: tokenize.run(out, profile.data, 320, silent, ours))
    base_ref = build(Stage.QUANTIZE, lambda out: quantize.run(out, profile, base, silent))
    tokens, quantized = store.path(token_ref), store.path(base_ref)
    first = Shards(tokens, "train").batch([0])
    assert ours.end_of_text == 0
    assert set(ours.decode(first.tokens[0].tolist()).split()) & set(WORDS)
    start = build(Stage.ATTACH_LORA, lambda out: attach_lora.run(out, profile, quantized))
    (tmp_path / "work").mkdir()
    places = tokens, quantized, store.path(start), tmp_path / "work"
    trained = build(Stage.TRAIN, lambda out: train.run(out, profile, *places, silent))
    inputs = {"tokens": token_ref, "base": base_ref, "trained": trained}
    make = lambda out: checkpoint.run(out, profile, store.path(trained), quantized, tokens, {})  # noqa: E731
    release = store.path(build(Stage.CHECKPOINT, make, **inputs))
    (tmp_path / "evaluated").mkdir()
    facts = evaluate.run(tmp_path / "evaluated", profile, release, tokens, quantized, silent)
    assert isinstance(Tokenizer.load(release), Foreign)
    text = (tmp_path / "evaluated" / "evaluation.json").read_text()
    scores = json.loads(text)
    assert facts
    assert scores["fine_tuned"]["loss"] < scores["base"]["loss"] - 0.3
    assert scores["base"]["bytes"] == sum(
        int(ours.bytes_per_token()[b.targets[b.weights > 0]].sum())
        for b in [Shards(tokens, "held_out").batch(range(Shards(tokens, "held_out").rows))]
    )
    assert cli.main(["generate", "demo", "--prompt", "hello", "--max-tokens", "3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] <= 3
    mx.clear_cache()


def test_another_tokenizer_is_other_tokens(base: Path, tmp_path: Path):
    profile = profile_for(base, tmp_path)
    settings = pipeline.settings(Stage.TOKENIZE, profile, profile.data)
    assert settings["tokenizer"] == durable.sha256_file(base / "tokenizer.json")
    plain = load_profile("demo")
    assert "tokenizer" not in pipeline.settings(Stage.TOKENIZE, plain, plain.data)
    assert type(pipeline.tokenizer(plain)) is Tokenizer
