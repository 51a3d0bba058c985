"""`magellano evaluate RUN --tasks` against the real lm-eval: local tasks, its own files, base against fine-tuned."""

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from magellano import cli, export, loader
from magellano.backend import mx
from magellano.errors import InputError
from magellano.generate import generate
from magellano.model import MagellanoLM
from magellano.progress import silent
from magellano.tokenizer import Tokenizer
from tests import models
from tests.stages import test_evaluate as small

pytest.importorskip("lm_eval", reason="pip install -r requirements-peers.lock")

from magellano import harness  # it needs lm_eval

made = small.made  # a release on its base, in a store
TOKENIZER = Tokenizer(300)
END = TOKENIZER.end_of_text
CHOICE = """
task: pick
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/pick.jsonl}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
WRITE = """
task: write
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/pick.jsonl}}
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: " yes"
generation_kwargs: {until: ["e"], max_gen_toks: 5}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
READ = """
task: read
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/pick.jsonl}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: bits_per_byte}]
"""
QUESTIONS = ["Is water wet?", "name3 -> ", "", "Two words. " * 4, "naïve ", "Why?\n\n"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tasks")
    rows = [{"question": q, "choices": [" yes", " no, not at all"], "answer": n % 2} for n, q in enumerate(QUESTIONS)]
    (made / "pick.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for name, text in (("pick", CHOICE), ("write", WRITE), ("read", READ)):
        (made / f"{name}.yaml").write_text(text.replace("FOLDER", str(made)), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def model() -> MagellanoLM:
    return models.quantized(models.TINY, models.LoraConfig(rank=2))


def requests(*arguments: tuple[Any, ...]) -> list[Any]:
    return [SimpleNamespace(args=each) for each in arguments]


def adapter(model: MagellanoLM, batch: int = 3) -> harness.Adapter:
    return harness.Adapter(model, TOKENIZER, batch, silent, "model")


def full(model: MagellanoLM, tokens: list[int], counted: int) -> tuple[float, bool]:
    """The same of one text, from all its logits."""
    logits_TV = np.array(model(mx.array([tokens[:-1]]))[0].astype(mx.float32)).astype(np.float64)
    p_TV = logits_TV - np.log(np.exp(logits_TV).sum(1, keepdims=True))
    rows = np.arange(len(tokens) - 1 - counted, len(tokens) - 1)
    wanted = np.array(tokens[1:])[rows]
    return float(p_TV[rows, wanted].sum()), bool((logits_TV[rows].argmax(1) == wanted).all())


def test_log_likelihoods_are_those_of_the_full_forward(model: MagellanoLM):
    pairs = [(q, c) for q in QUESTIONS for c in (" yes", " no, not at all", "")]
    got = adapter(model).loglikelihood(requests(*pairs))
    for (context, continuation), (total, greedy) in zip(pairs, got, strict=True):
        bare = context.rstrip()
        tail = TOKENIZER.encode(context + continuation)[len(TOKENIZER.encode(bare)) :]
        row = [END, *TOKENIZER.encode(bare), *tail]
        wanted = full(model, row, len(tail)) if tail else (0.0, True)
        assert (total, greedy) == (pytest.approx(wanted[0], abs=1e-4), wanted[1]), (context, continuation)
    likeliest = [
        (f"x{n}?", TOKENIZER.decode(list(generate(model, TOKENIZER.encode(f"x{n}?"), END, 1)))) for n in range(40)
    ]
    plain = [(c, t) for c, t in likeliest if t.isascii() and TOKENIZER.encode(c + t)[:-1] == TOKENIZER.encode(c)]
    assert plain, "no continuation that is a token of its own: choose other contexts"
    assert all(greedy for _, greedy in adapter(model).loglikelihood(requests(*plain)))


def test_mlx_lm_evaluates_an_export_alike(model: MagellanoLM, tmp_path: Path):
    from mlx_lm.evaluate import MLXLM

    export.mlx_lm(tmp_path / "m", model, TOKENIZER, "float32", chat=False)
    theirs = MLXLM(str(tmp_path / "m"), trust_remote_code=True)
    asked = [q for q in QUESTIONS if q and q == q.rstrip()]  # of blanks before a continuation it knows no rule
    pairs = requests(*[(q, c) for q in (*asked, "One: 1, two:") for c in (" yes", " no, not at all")])
    for got, wanted in zip(theirs.loglikelihood(pairs), adapter(model).loglikelihood(pairs), strict=True):
        assert got == (pytest.approx(wanted[0], abs=1e-3), wanted[1])


def test_a_whole_text_is_scored_however_long(model: MagellanoLM):
    texts = ["", "a", "Some words. " * 60]  # the last in more than one piece
    got = adapter(model).loglikelihood_rolling(requests(*[(t,) for t in texts]))
    rows = [[END, *TOKENIZER.encode(t)] for t in texts]
    assert len(rows[2]) > 2 * 256
    assert got == pytest.approx([full(model, r, len(r) - 1)[0] if len(r) > 1 else 0.0 for r in rows], abs=1e-2)


def test_text_is_generated_until(model: MagellanoLM):
    plain = adapter(model).generate_until(requests(("Why?", {"max_gen_toks": 6}), ("", {"max_gen_toks": 4})))
    assert plain == [
        TOKENIZER.decode(list(generate(model, TOKENIZER.encode(q), END, n))) for q, n in (("Why?", 6), ("", 4))
    ]
    stop = plain[0][2]
    cut = adapter(model).generate_until(requests(("Why?", {"max_gen_toks": 6, "until": [stop]})))
    assert cut == [plain[0][: plain[0].index(stop)]]
    with pytest.raises(InputError, match=r"num_beams.*known are until"):
        adapter(model).generate_until(requests(("Why?", {"num_beams": 4})))
    assert harness.generation({"do_sample": True, "top_p": 0.9})[2].temperature == 1


def test_base_against_fine_tuned(made: Any, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setenv("MAGELLANO_HOME", str(made.home))
    argv = ["evaluate", str(made.release), "--out", str(tmp_path), "--tasks", "pick,write,read", "--tasks-from"]
    assert cli.main([*argv, str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["verdict"]
    assert facts["tasks"] == json.loads((tmp_path / "evaluation.json").read_text())["tasks"]
    rows = {(r["task"], r["metric"]): r for r in facts["tasks"]}
    assert set(rows) == {("pick", "acc"), ("pick", "acc_norm"), ("write", "exact_match"), ("read", "bits_per_byte")}
    for name, key in (("base", "base"), ("fine-tuned", "fine_tuned")):
        (file,) = (tmp_path / "lm-eval" / name).glob("results_*.json")
        own = json.loads(file.read_text())
        assert own["model_name"] == name
        assert own["results"]["pick"]["acc,none"] == rows["pick", "acc"][key]
        assert own["results"]["pick"]["acc_stderr,none"] == pytest.approx(rows["pick", "acc"][f"{key}_stderr"])
        assert len(list((tmp_path / "lm-eval" / name).glob("samples_*.jsonl"))) == 3
    text = "".join(QUESTIONS)
    base = loader.load_model(made.base, "float32")
    total = sum(full(base, [END, *TOKENIZER.encode(q)], len(TOKENIZER.encode(q)))[0] for q in QUESTIONS if q)
    assert rows["read", "bits_per_byte"]["base"] == pytest.approx(-total / math.log(2) / len(text.encode()), rel=1e-3)
    assert rows["read", "bits_per_byte"]["fine_tuned"] != rows["read", "bits_per_byte"]["base"]
    assert rows["pick", "acc"]["samples"] == len(QUESTIONS)
    page = (tmp_path / "evaluation.md").read_text()
    assert "| pick | 6 | acc ↑ |" in page
    assert page.count(" ± ") >= 6


def test_what_cannot_be_is_said_before_anything_runs(folder: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"--tasks pikc: no such task in .*; there are pick, read, write"):
        harness.Tasks(["pikc"], folder)
    with pytest.raises(InputError, match="no such folder"):
        harness.Tasks(["pick"], folder / "none")
    (tmp_path / "far.yaml").write_text(CHOICE.replace("pick", "far").replace("json", "somebody/elsewhere"))
    with pytest.raises(InputError, match=r"far: cannot be loaded .*nothing is downloaded"):
        harness.Tasks(["far"], tmp_path)


def test_the_change_has_the_error_of_its_pairs():
    base, tuned = [0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 0.0, 1.0]
    results = [
        {
            "results": {"t": {"acc,none": float(np.mean(values)), "acc_stderr,none": 0.25, "alias": "t"}},
            "samples": {"t": [{"doc_id": n, "filter": "none", "acc": v} for n, v in enumerate(values)]},
        }
        for values in (base, tuned)
    ]
    (row,) = harness.compare(*results)
    assert (row["base"], row["fine_tuned"]) == (0.5, 0.75)
    assert row["change_stderr"] == pytest.approx(np.std(np.subtract(tuned, base), ddof=1) / 2)
