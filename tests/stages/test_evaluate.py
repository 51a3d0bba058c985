"""The evaluate stage and the commands that use a release, on a tiny real base, adapter and split in a real store."""

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magellano import cli, loader, lora, report
from magellano.artifacts import Store
from magellano.backend import mx
from magellano.data.shards import Rows, write_facts, write_split
from magellano.names import METRICS, Stage
from magellano.profile import Profile, load_profile
from magellano.progress import silent
from magellano.runs import Release, input_folder
from magellano.stages import attach_lora, evaluate, quantize
from magellano.tokenizer import Tokenizer

PROFILE = """
[model]
d_model = 32
n_layers = 4
n_experts = 4
d_ff = 48
d_state = 4
dt_rank = 4
vocab_size = 300
[data]
format = "completions"
files = ["unused.jsonl"]
seq_len = 32
[train]
steps = 2
warmup = 0
compute = "float32"
[evaluate]
batch = 3
samples = 2
sample_tokens = 6
"""
PAIRS = [(f"name{n} -> ", f"the number {n}") for n in range(7)]


@dataclass
class Made:
    home: Path
    profile: Profile
    tokens: Path
    base: Path
    release: Path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "tiny.toml").write_text(PROFILE, encoding="utf-8")
    profile = load_profile(folder / "tiny.toml")
    home = folder / "home"
    store = Store(home)

    def build(stage: Stage, make: Any, **inputs: Any) -> Any:
        return store.build(stage, f"{stage}-key", version=1, inputs=inputs, config={}, make=make).ref

    tokens = build(Stage.TOKENIZE, lambda out: write_tokens(out, profile))
    base = build(Stage.QUANTIZE, lambda out: quantize.run(out, profile, None, silent))

    def release(out: Path) -> dict[str, Any]:
        attach_lora.run(out, profile, store.path(base))
        settings, tensors = lora.load(out, profile.model)
        keys = iter(mx.random.split(mx.random.key(1), len(tensors)))
        tensors = {name: 0.1 * mx.random.normal(value.shape, key=next(keys)) for name, value in tensors.items()}
        lora.save(out, profile.model, settings, tensors, base=f"../../quantize/{base.key}")
        (out / METRICS).write_text('{"step": 1, "loss": 6.0}\n{"step": 2, "loss": 5.0}\n', encoding="utf-8")
        (out / "profile.json").write_text(profile.model_dump_json(), encoding="utf-8")
        Tokenizer(profile.model.vocab_size).save(out)
        return {}

    made = build(Stage.CHECKPOINT, release, base=base, tokens=tokens)
    return Made(home, profile, store.path(tokens), store.path(base), store.path(made))


def write_tokens(out: Path, profile: Profile) -> dict[str, Any]:
    """One pair a row, completion counted, padded with end-of-text."""
    tokenizer, length = Tokenizer(profile.model.vocab_size), profile.data.seq_len
    rows = np.full((4, len(PAIRS), length), 0)
    rows[:2] = tokenizer.end_of_text
    rows[3] = 1
    for n, (prompt, completion) in enumerate(PAIRS):
        before, after = tokenizer.encode(prompt), tokenizer.encode(completion)
        document = [*before, *after]
        size = len(document) + 1
        assert size <= length
        rows[0, n, 1:size] = document
        rows[1, n, : size - 1] = document
        rows[2, n, len(before) : size] = 1
        rows[3, n, 1:size] = 0
    wide, narrow = rows[:2].astype(np.uint16), rows[2:].astype(np.uint8)
    block = Rows(wide[0], wide[1], narrow[0], narrow[1])
    for split in ("train", "held_out"):
        write_split(out, split, [block])
    counts = {"train": len(PAIRS), "held_out": len(PAIRS)}
    write_facts(out, vocab_size=profile.model.vocab_size, seq_len=length, rows=counts)
    return counts


@pytest.fixture(scope="module")
def out(made: Made, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("out")
    return folder, evaluate.run(folder, made.profile, made.release, made.tokens, made.base, silent)


def dense_loss(folder: Path, made: Made) -> tuple[float, int]:
    """Nats a counted target by the full logits and float64, document by document without packing."""
    model, tokenizer = loader.load_model(folder, "float32"), Tokenizer(made.profile.model.vocab_size)
    total, count = 0.0, 0
    for prompt, completion in PAIRS:
        before, after = tokenizer.encode(prompt), tokenizer.encode(completion)
        row = [tokenizer.end_of_text, *before, *after, tokenizer.end_of_text]
        logits = np.array(model(mx.array([row[:-1]]))[0]).astype(np.float64)
        logp = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        for at in range(len(before), len(row) - 1):
            total -= logp[at, row[at + 1]]
            count += 1
    return total / count, count


def test_measures_are_those_of_each_document_alone(made: Made, out: tuple[Path, dict[str, Any]]):
    summary = out[1]
    for name, folder in (("base", made.base), ("fine_tuned", made.release)):
        loss, count = dense_loss(folder, made)
        assert summary[name]["tokens"] == count
        assert summary[name]["loss"] == pytest.approx(loss, rel=1e-4)
        assert summary[name]["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
    spelled = sum(len(completion.encode()) for _, completion in PAIRS)
    base = summary["base"]
    assert base["bytes"] == spelled
    assert base["bits_per_byte"] == pytest.approx(base["loss"] * base["tokens"] / math.log(2) / spelled)


def test_the_adapter_makes_the_difference(out: tuple[Path, dict[str, Any]]):
    base, tuned, verdict = (out[1][name] for name in ("base", "fine_tuned", "verdict"))
    assert base["loss"] != tuned["loss"]
    assert verdict["improved"] == (tuned["loss"] < base["loss"])
    assert verdict["loss_percent"] == pytest.approx(100 * (1 - tuned["loss"] / base["loss"]))


def test_expert_use_covers_every_moe_layer_and_copy(made: Made, out: tuple[Path, dict[str, Any]]):
    for name in ("base", "fine_tuned"):
        (use,) = out[1][name]["experts"]
        assert len(use["share"]) == made.profile.model.n_experts
        assert sum(use["share"]) == pytest.approx(1)
        assert 0 < use["evenness"] <= 1


def test_files_say_what_the_summary_says(out: tuple[Path, dict[str, Any]]):
    folder, summary = out
    evaluation = json.loads((folder / report.EVALUATION_JSON).read_text(encoding="utf-8"))
    samples = evaluation.pop("samples")
    assert evaluation == json.loads(json.dumps(summary))
    assert len(samples) == 2
    assert all((s["prompt"], s["truth"]) in PAIRS for s in samples)
    page = (folder / report.EVALUATION_MD).read_text(encoding="utf-8")
    assert summary["verdict"]["text"] in page
    for picture in (report.LOSS_PNG, report.EXPERTS_PNG):
        assert (folder / picture).read_bytes().startswith(b"\x89PNG")
        assert picture in page


def test_the_same_again_gives_the_same_files(made: Made, out: tuple[Path, dict[str, Any]], tmp_path: Path):
    evaluate.run(tmp_path, made.profile, made.release, made.tokens, made.base, silent)
    for path in sorted(out[0].iterdir()):
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name


def test_progress_covers_both_models(made: Made, tmp_path: Path):
    seen: list[tuple[int, int]] = []
    evaluate.run(
        tmp_path, made.profile, made.release, made.tokens, made.base, lambda d, t, **facts: seen.append((d, t))
    )
    assert seen == [(3, 14), (6, 14), (7, 14), (10, 14), (13, 14), (14, 14)]


def test_a_release_is_found_by_folder_key_and_profile(made: Made, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MAGELLANO_HOME", str(made.home))
    for run in (str(made.release), "checkpoint-k", "tiny"):
        found = Release.find(run)
        assert (found.folder, found.base, found.tokens) == (made.release, made.base, made.tokens)
        assert found.profile == made.profile


def test_what_an_artifact_was_made_from(made: Made, tmp_path: Path):
    assert input_folder(made.release, Stage.QUANTIZE) == made.base
    assert input_folder(made.release, Stage.PRETRAIN) is None
    assert input_folder(tmp_path, Stage.QUANTIZE) is None


def command(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = cli.main(list(argv))
    return code, *capsys.readouterr()


def test_evaluate_command(
    made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("MAGELLANO_HOME", str(made.home))
    code, text, _ = command(capsys, "evaluate", "tiny", "--out", str(tmp_path / "e"), "--json")
    assert code == 0
    assert json.loads(text)["base"]["loss"] == pytest.approx(dense_loss(made.base, made)[0], rel=1e-4)
    assert (tmp_path / "e" / report.LOSS_PNG).is_file()
    code, text, _ = command(capsys, "evaluate", str(made.release), "--out", str(tmp_path / "f"))
    assert code == 0
    assert "fine-tuned" in text


def test_generate_command(made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setenv("MAGELLANO_HOME", str(made.home))
    argv = ["generate", "tiny", "--prompt", "name3 -> ", "--max-tokens", "5", "--temperature", "0.9", "--seed", "4"]
    code, text, _ = command(capsys, *argv, "--json")
    facts = json.loads(text)
    assert code == 0
    assert 0 < facts["tokens"] <= 5
    code, text, err = command(capsys, *argv)
    assert code == 0
    assert text.rstrip("\n") == facts["text"].rstrip("\n")
    assert "tokens/s" in err


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["generate", "tinny", "--prompt", "x"], "no release of that folder, key or profile"),
        (["generate", "tiny", "--prompt", "x", "--top-p", "2"], "top_p"),
        (["generate", "tiny", "--prompt", "x", "--max-tokens", "0"], "max_tokens"),
        (["evaluate", "{base}"], "not a release"),
        (["evaluate", "tiny", "--tasks", "x"], "lm_eval is not installed; make peers"),
        (["evaluate", "tiny", "--limit", "3"], "--limit: no task is named"),
        (["evaluate", "tiny", "--tasks", "x", "--limit", "0"], "limit of 1 or more"),
    ],
)
def test_commands_refuse_what_is_no_release(
    argv: list[str], line: str, made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("MAGELLANO_HOME", str(made.home))
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    code, _, err = command(capsys, *(a.format(base=made.base) for a in argv))
    assert code == 2
    assert line in err
