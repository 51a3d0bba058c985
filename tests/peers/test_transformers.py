"""`magellano import` against the real transformers and tokenizers: same logits, same tokens. Small random models."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magellano import cli, export, generate, loader
from magellano.backend import mx
from magellano.hf_tokenizer import FILE, Foreign
from magellano.profile import ModelConfig
from magellano.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers", reason="pip install -r requirements-peers.lock")
torch = pytest.importorskip("torch", reason="pip install -r requirements-peers.lock")
tokenizers = pytest.importorskip("tokenizers", reason="pip install -r requirements-peers.lock")

SIZES = {"vocab_size": 320, "hidden_size": 48, "state_size": 6, "num_hidden_layers": 3, "time_step_rank": 5}
KINDS = {
    "tied": ("Mamba", {}),
    "untied": ("Mamba", {"tie_word_embeddings": False}),
    "auto rank, other sizes": ("Mamba", {"time_step_rank": "auto", "expand": 3, "conv_kernel": 3, "hidden_size": 40}),
    "falcon": ("FalconMamba", {"tie_word_embeddings": False}),
    "falcon, tied": ("FalconMamba", {"mixer_rms_eps": 1e-4}),
    "an inner width beside expand, as falcon-mamba-7b": ("FalconMamba", {"expand": 16, "intermediate_size": 96}),
}
TEXTS = ["Hello world, hello again", "  two  spaces\n\nnew line", "naïve 日本 🎉", "", "<|endoftext|> is text here"]


def trained_tokenizer(folder: Path) -> Any:
    """A byte-level BPE as GPT-NeoX has it: special tokens first, plain added tokens last."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|padding|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=290, special_tokens=special, initial_alphabet=alphabet)
    made.train_from_iterator(["hello world, hello again and again the world"] * 20, trainer)
    made.add_tokens(["    "])
    made.save(str(folder / FILE))
    return made


@pytest.fixture(scope="module", params=list(KINDS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Path]:
    """Their model, its folder, and where ours was imported to."""
    name, changes = KINDS[request.param]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | changes, eos_token_id=0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():  # so that every path matters
            if not parameter_name.endswith("A_log"):
                p.add_(0.2 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(folder)
    trained_tokenizer(folder)
    out = folder.parent / f"{folder.name}-ours"
    assert cli.main(["import", str(folder), str(out)]) == 0
    return model, folder, out


def theirs(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def test_logits_are_theirs(pair: tuple[Any, Path, Path]):
    model, _, out = pair
    ours = loader.load_model(out, "float32")
    tokens = np.random.default_rng(0).integers(0, 320, (2, 37))
    wanted = theirs(model, tokens)
    assert np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(np.array(ours(mx.array(tokens))), wanted, atol=1e-3)


def test_a_decoder_gives_their_logits_too(pair: tuple[Any, Path, Path]):
    model, _, out = pair
    ours = loader.load_model(out, "float32")
    tokens = np.random.default_rng(1).integers(0, 320, (1, 9))
    decoder, state = ours.decoder(), ours.initial_state(1)
    wanted = theirs(model, tokens)
    for t in range(9):
        logits, state = decoder(mx.array(tokens[:, t]), state)
        np.testing.assert_allclose(np.array(logits), wanted[:, t], atol=1e-3)


def test_greedy_text_is_theirs(pair: tuple[Any, Path, Path], capsys: pytest.CaptureFixture[str]):
    model, _, out = pair
    tokenizer = Tokenizer.load(out)
    ids = [tokenizer.end_of_text, *tokenizer.encode("hello again")]
    made = list(generate.generate(loader.load_model(out, "float32"), ids[1:], tokenizer.end_of_text, 8))
    row = list(ids)
    for token in made:
        assert int(theirs(model, np.array([row]))[0, -1].argmax()) == token
        row.append(token)
    assert cli.main(["generate", str(out), "--prompt", "hello again", "--max-tokens", "8", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == tokenizer.decode(made)


def test_tokens_are_theirs(pair: tuple[Any, Path, Path]):
    _, folder, out = pair
    wanted, ours = tokenizers.Tokenizer.from_file(str(folder / FILE)), Tokenizer.load(out)
    assert isinstance(ours, Foreign)
    assert (ours.vocab_size, ours.end_of_text) == (320, 0)
    for text in [*TEXTS[:4], "a    b"]:
        ids = wanted.encode(text, add_special_tokens=False).ids
        assert ours.encode(text) == ids
        assert ours.encode_many([text, text]) == [ids, ids]
        assert ours.decode(ids) == text
        assert ours.bytes_per_token()[ids].sum() == len(text.encode())


def test_a_moe_made_of_it_has_its_logits(pair: tuple[Any, Path, Path], tmp_path: Path):
    """The way to production3b from mamba-1.4b, small: first a feed-forward, then experts."""
    model, folder, _ = pair
    tokens = np.random.default_rng(2).integers(0, 320, (2, 20))
    wanted = theirs(model, tokens)
    one, many = str(tmp_path / "one"), str(tmp_path / "many")
    assert cli.main(["import", str(folder), one, "--experts", "1", "--moe-every", "3", "--d-ff", "64"]) == 0
    assert cli.main(["import", one, many, "--experts", "4", "--top-k", "2"]) == 0
    ours = loader.load_model(many, "float32")
    assert (ours.config.n_layers, ours.config.n_experts, ours.config.top_k) == (4, 4, 2)
    np.testing.assert_allclose(np.array(ours(mx.array(tokens))), wanted, atol=1e-3)


def test_their_16_bit_files_are_read(tmp_path: Path):
    torch.manual_seed(1)
    config = transformers.MambaConfig(**SIZES, eos_token_id=[0, 3])
    model = transformers.MambaForCausalLM(config).bfloat16()
    model.save_pretrained(tmp_path / "m", max_shard_size="50KB")
    trained_tokenizer(tmp_path / "m")
    assert len(list((tmp_path / "m").glob("*.safetensors"))) > 1
    assert cli.main(["import", str(tmp_path / "m"), str(tmp_path / "o")]) == 0
    tokens = np.random.default_rng(3).integers(0, 320, (1, 12))
    wanted = theirs(model.float(), tokens)
    np.testing.assert_allclose(
        np.array(loader.load_model(tmp_path / "o", "float32")(mx.array(tokens))), wanted, atol=1e-3
    )


def test_an_imported_model_goes_on_to_mlx_lm(pair: tuple[Any, Path, Path], tmp_path: Path):
    mlx_lm = pytest.importorskip("mlx_lm", reason="pip install -r requirements-peers.lock")
    model, _, out = pair
    facts = export.mlx_lm(tmp_path / "e", loader.load_model(out, "float32"), Tokenizer.load(out), "float32", False)
    again, tokenizer = mlx_lm.load(facts["folder"], trust_remote_code=True)
    tokens = np.random.default_rng(4).integers(0, 320, (2, 21))
    np.testing.assert_allclose(np.array(again(mx.array(tokens))), theirs(model, tokens), atol=1e-3)
    assert tokenizer.encode("hello again") == Tokenizer.load(out).encode("hello again")
    assert tokenizer.eos_token_id == 0


@pytest.mark.parametrize("size", [300, 50257])
def test_our_own_tokenizer_comes_back_from_its_json(size: int, tmp_path: Path):
    from magellano import hf_tokenizer

    ours = Tokenizer(size)
    hf_tokenizer.save(tmp_path, ours, chat=False)
    back = Foreign(tmp_path / FILE, size, ours.end_of_text)
    for text in TEXTS[:4]:
        assert back.encode(text) == ours.encode(text)
        assert back.decode(ours.encode(text)) == text
    assert back.bytes_per_token().tolist() == ours.bytes_per_token().tolist()


def test_a_shape_of_production_is_in_reach():
    """mamba-1.4b: 48 layers of d_model 2048, R 128. production3b's 39 layers take 30 of them."""
    from magellano import foreign, upcycle

    big = ModelConfig(
        **foreign.dense(48), d_model=2048, d_state=16, dt_rank=128, vocab_size=50280, norm_eps=1e-5, tied=True
    )
    new = big.model_copy(update={"n_layers": 39, "moe_every": 4, "n_experts": 8, "top_k": 2, "d_ff": 8192})
    upcycle.check(big, new)
