"""`magellano export --to mlx-lm` against the real package: same logits, same tokens, its own commands."""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magellano import cli, export, foreign, generate, merge
from magellano.backend import mx
from magellano.data import formats
from magellano.data.shapes import conversation
from magellano.data.template import END, Template
from magellano.model import MagellanoLM, seeded
from magellano.names import DataFormat
from magellano.profile import LoraConfig, ModelConfig
from magellano.tokenizer import Tokenizer
from tests import models

mlx_lm = pytest.importorskip("mlx_lm", reason="mlx-lm is not installed: pip install -r requirements-peers.lock")
os.environ["HF_HUB_OFFLINE"] = "1"

CONFIG = ModelConfig(d_model=32, n_layers=5, n_experts=4, d_ff=64, d_state=4, dt_rank=3, vocab_size=300, moe_every=2)
TOKENIZER = Tokenizer(CONFIG.vocab_size)
Pair = tuple[MagellanoLM, Any, Any, Path]
TEXTS = [
    "Hello world", "  indented\n\n\ttabs \n", "naïve café, 12345 apples; don't", "日本語 と emoji 🎉👩‍🚀", "", " ",
    "a" * 50, "\r\n x\u00a0y\u200b", "def f(x): return x**2  # comment", "I'LL we've\u2019s",
]  # fmt: skip


@pytest.fixture(scope="module", params=["dense", "nf4 and an adapter"])
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[MagellanoLM, Any, Any, Path]:
    adapted = request.param != "dense"
    ours = models.quantized(CONFIG, LoraConfig(rank=4)) if adapted else MagellanoLM(CONFIG, seeded(3))
    folder = tmp_path_factory.mktemp("export") / "model"
    export.mlx_lm(folder, ours, TOKENIZER, "float32", chat=True)
    theirs, tokenizer = mlx_lm.load(str(folder), trust_remote_code=True)
    return ours, theirs, tokenizer, folder


def close(a: mx.array, b: mx.array, bound: float = 1e-4) -> bool:
    return mx.abs(a - b).max().item() <= bound * mx.abs(b).max().item()


def test_logits_are_ours(pair: Pair):
    ours, theirs, _, _ = pair
    for length in (1, 32, 33, 100):  # the scan's chunks are of 32
        tokens = mx.array(np.random.default_rng(length).integers(0, 300, (2, length)))
        assert close(theirs(tokens), ours(tokens))


@pytest.mark.parametrize("tied", [True, False])
def test_a_mamba_that_it_saved_is_imported(tied: bool, tmp_path: Path):
    from mlx_lm.models import mamba
    from mlx_lm.utils import save_config, save_model

    config = {
        "model_type": "mamba", "vocab_size": 300, "hidden_size": 32, "intermediate_size": 64, "state_size": 4,
        "num_hidden_layers": 2, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True, "time_step_rank": 3,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    theirs = mamba.Model(mamba.ModelArgs.from_dict(config))
    save_model(tmp_path, theirs)
    save_config(config, tmp_path / "config.json")
    found = foreign.read(tmp_path)
    mine = MagellanoLM(found.config, found.source())
    tokens = mx.array(np.random.default_rng(0).integers(0, 300, (2, 17)))
    np.testing.assert_allclose(np.array(mine(tokens)), np.array(theirs(tokens)), atol=1e-4)


def test_rows_of_lengths_of_their_own_are_merged(tmp_path: Path):
    targets = ("in_proj", "x_proj", "dt_proj", "out_proj", "w1", "w2")
    ours = models.quantized(CONFIG, LoraConfig(kind="dora", rank=4, targets=targets))
    export.mlx_lm(tmp_path / "model", ours, TOKENIZER, "float32", chat=False)
    theirs, _ = mlx_lm.load(str(tmp_path / "model"), trust_remote_code=True)
    tokens = mx.array(np.random.default_rng(0).integers(0, 300, (2, 40)))
    assert close(theirs(tokens), ours(tokens))


def test_a_cache_carries_the_state(pair: Pair):
    ours, theirs, _, _ = pair
    tokens = mx.array(np.random.default_rng(5).integers(0, 300, (2, 60)))
    cache, pieces = theirs.make_cache(), []
    for start, end in ((0, 2), (2, 45), (45, 46), (46, 60)):
        pieces.append(theirs(tokens[:, start:end], cache))
    assert close(mx.concatenate(pieces, axis=1), ours(tokens))


def test_greedy_tokens_are_ours(pair: Pair):
    ours, theirs, tokenizer, _ = pair
    for text in ("Hello", "a longer prompt " * 20):
        wanted = list(generate.generate(ours, TOKENIZER.encode(text), TOKENIZER.end_of_text, 12))
        made = [one.token for one in mlx_lm.stream_generate(theirs, tokenizer, text, max_tokens=12)]
        assert made == wanted


def test_a_batch_of_prompts_is_each_alone(pair: Pair):
    """mlx-lm pads a batch's prompts on either side: the state must not see it."""
    _, theirs, tokenizer, _ = pair
    prompts = [tokenizer.encode(text) for text in ("Hello", "a longer prompt " * 9, "x")]
    made = mlx_lm.batch_generate(theirs, tokenizer, prompts, max_tokens=8, return_token_ids=True).token_ids
    alone = [[one.token for one in mlx_lm.stream_generate(theirs, tokenizer, p, max_tokens=8)] for p in prompts]
    assert made == alone
    assert len({tuple(tokens) for tokens in made}) == 3


def test_padding_on_either_side_changes_nothing(pair: Pair):
    from mlx_lm.models.cache import ArraysCache

    ours, theirs, _, _ = pair
    rng = np.random.default_rng(6)
    rows, then = [rng.integers(0, 300, n).tolist() for n in (3, 40, 2)], rng.integers(0, 300, (3, 4)).tolist()
    alone = [ours(mx.array([row + after]))[0, -4:] for row, after in zip(rows, then, strict=True)]
    for left in (True, False):
        padding = [40 - len(row) for row in rows]
        cache = [ArraysCache(2, left_padding=padding if left else None) for _ in theirs.make_cache()]
        if not left:
            for one in cache:
                one.prepare(lengths=[len(row) for row in rows])
        filled = [[0] * pad + row if left else row + [0] * pad for row, pad in zip(rows, padding, strict=True)]
        for start in range(0, 40, 25):  # a second piece that some rows do not reach
            theirs(mx.array(filled)[:, start : start + 25], cache)
        for one in cache:
            one.finalize()
        after = theirs(mx.array(then), cache)
        assert all(close(got, wanted) for got, wanted in zip(after, alone, strict=True)), f"{left=}"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_weights_run_and_are_near(dtype: str, tmp_path: Path):
    ours = models.quantized(CONFIG, LoraConfig(rank=4))
    export.mlx_lm(tmp_path / "m", ours, TOKENIZER, dtype, chat=False)
    theirs, tokenizer = mlx_lm.load(str(tmp_path / "m"), trust_remote_code=True)
    tokens = mx.array(np.random.default_rng(1).integers(0, 300, (2, 40)))
    got = theirs(tokens)
    assert got.dtype == getattr(mx, dtype)
    # As near to float32 as our own model in 16 bits: where two experts are nearly as likely, rounding picks the other.
    weights = dict(merge.tensors(ours, getattr(mx, dtype)))
    in_16_bits = MagellanoLM(CONFIG, lambda spec: weights[spec.name], getattr(mx, dtype))
    errors = [mx.linalg.norm(y.astype(mx.float32) - ours(tokens)).item() for y in (got, in_16_bits(tokens))]
    assert 0 < errors[0] <= 1.5 * errors[1]
    assert tokenizer.chat_template is None


@pytest.mark.parametrize("size", [257, 300, 5000, 50257])
def test_the_tokenizer_is_ours(size: int, tmp_path: Path):
    from transformers import AutoTokenizer

    from magellano import hf_tokenizer

    ours = Tokenizer(size)
    hf_tokenizer.save(tmp_path, ours, chat=True)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), text
        assert theirs.encode(text) == [ours.end_of_text, *ours.encode(text)]
        assert theirs.decode(ours.encode(text)) == text
    assert theirs.eos_token_id == theirs.bos_token_id == ours.end_of_text
    assert len(theirs) == size


CALLS = [
    {"type": "function", "id": "1", "function": {"name": "add", "arguments": {"a": "<é'\">", "b": [1, None]}}},
    {"type": "function", "function": {"name": "now", "arguments": {}}},
]
TALKS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "talk": ([
        {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi\nthere"},
        {"role": "assistant", "content": "Hello."}, {"role": "user", "content": "More"},
    ], None),
    "tools": ([
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": CALLS},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
        {"role": "assistant", "content": "So:", "tool_calls": CALLS[1:]}, {"role": "tool", "content": "4"},
    ], [{"type": "function", "function": {"name": "add", "parameters": {"a": "ü"}}}, {"name": "now"}]),
}  # fmt: skip


@pytest.mark.parametrize("name", TALKS)
def test_the_chat_template_is_that_of_training(pair: Pair, name: str):
    messages, tools = TALKS[name]
    ids = [TOKENIZER.end_of_text]
    for part in formats.segments({"messages": messages, "tools": tools}, DataFormat.CHAT):
        ids += TOKENIZER.encode(part.text) + ([TOKENIZER.end_of_text] if part.ends else [])
    ids += TOKENIZER.encode(formats.header(formats.Role.ASSISTANT))
    text = pair[2].apply_chat_template(messages, tools=tools, add_generation_prompt=True, tokenize=False)
    assert pair[2].encode(text, add_special_tokens=False) == ids


@pytest.mark.parametrize("eos", ["<|im_end|>", None])
def test_a_template_of_the_data_renders_what_was_trained(eos: str | None, tmp_path: Path):
    source = (
        "  {%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ bos_token + '<|im_start|>assistant\n' }}{% endif %}"
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": source, "eos_token": eos}))
    trained_with = Template.read(tmp_path / "tokenizer_config.json")
    export.mlx_lm(tmp_path / "m", MagellanoLM(CONFIG, seeded(3)), TOKENIZER, "float32", True, trained_with)
    _, tokenizer = mlx_lm.load(str(tmp_path / "m"), trust_remote_code=True)
    messages = [
        {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "More"},
    ]  # fmt: skip
    prompt = trained_with.prompt(conversation({"messages": messages}, DataFormat.CHAT))
    ids = [TOKENIZER.end_of_text]
    *ended, rest = prompt.split(END)
    ids += [token for piece in ended for token in (*TOKENIZER.encode(piece), TOKENIZER.end_of_text)]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert tokenizer.encode(text, add_special_tokens=False) == ids + TOKENIZER.encode(rest)
    assert len(ended) == (3 if eos else 0)


def command(*argv: str, **more: Any) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "mlx_lm", *argv]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=True, **more)


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["nf4 and an adapter"], indirect=True)  # either folder is the same to a program
def test_its_commands_run_the_folder(pair: Pair):
    folder = str(pair[3])
    model = ["--model", folder, "--trust-remote-code", "--max-tokens", "6"]
    wanted = TOKENIZER.decode(list(generate.generate(pair[0], TOKENIZER.encode("Hello"), TOKENIZER.end_of_text, 6)))
    out = command("generate", *model, "--ignore-chat-template", "--prompt", "Hello", "--verbose", "False").stdout
    assert out.strip("\n") == wanted.strip("\n")
    assert command("chat", *model, input="Hello\nq\n").returncode == 0


@pytest.mark.slow
@pytest.mark.parametrize("pair", ["nf4 and an adapter"], indirect=True)  # either folder is the same to a program
def test_its_server_answers(pair: Pair):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line = [sys.executable, "-m", "mlx_lm", "server", "--model", str(pair[3]), "--trust-remote-code"]
    server = subprocess.Popen([*line, "--host", "127.0.0.1", "--port", str(port)], stderr=subprocess.DEVNULL)
    try:
        body = {"prompt": "Hello", "max_tokens": 6, "temperature": 0}
        answer = ask(f"http://127.0.0.1:{port}/v1/completions", body, server)
        tokens = list(generate.generate(pair[0], TOKENIZER.encode("Hello"), TOKENIZER.end_of_text, 6))
        assert answer["choices"][0]["text"] == TOKENIZER.decode(tokens)
        chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6, "temperature": 0}
        said = ask(f"http://127.0.0.1:{port}/v1/chat/completions", chat, server)
        assert said["choices"][0]["message"]["content"]
    finally:
        server.terminate()
        server.wait(20)


def ask(url: str, body: dict[str, Any], server: subprocess.Popen[bytes]) -> Any:
    for _ in range(120):
        assert server.poll() is None, "the server ended"
        try:
            request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.load(answer)
        except ConnectionRefusedError:
            pass
        except urllib.error.URLError as e:
            if not isinstance(e.reason, ConnectionRefusedError):
                raise
        time.sleep(0.5)
    raise AssertionError("the server does not listen")


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    ours = models.write(tmp_path / "model", CONFIG)
    argv = ["export", str(tmp_path / "model"), "--to", "mlx-lm", str(tmp_path / "out"), "--dtype", "float32", "--json"]
    assert cli.main(argv) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["dtype"], facts["chat_template"]) == ("float32", False)
    theirs, _ = mlx_lm.load(facts["folder"], trust_remote_code=True)
    tokens = mx.array([[1, 2, 3]])
    assert close(theirs(tokens), ours(tokens))
