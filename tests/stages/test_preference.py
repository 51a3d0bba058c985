"""A fine-tune on preferences from its file to the evaluation, by the stages as they are."""

import json
from pathlib import Path
from typing import Any

import pytest

from magellano import cli, preference, report, run_page
from magellano.artifacts import Store
from magellano.errors import InputError
from magellano.gate import check
from magellano.names import METRICS, Stage
from magellano.profile import Profile, load_profile
from magellano.progress import silent
from magellano.stages import attach_lora, checkpoint, evaluate, quantize, tokenize, train
from tests.tiny import MODEL

PROFILE = """
[data]
format = "preference"
held_out = 0.3
seq_len = 48
[lora]
rank = 4
[train]
objective = "dpo"
dpo_beta = 0.5
steps = 10
batch = 4
lr = 2e-2
warmup = 1
compute = "float32"
log_every = 1
evaluate_every = 5
[evaluate]
samples = 1
sample_tokens = 4
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Profile, dict[Stage, Path]]:
    folder = tmp_path_factory.mktemp("preference")
    rows = [{"prompt": f"{n}: ", "chosen": "aa ab"[: 2 + n % 4], "rejected": "zz zy"[: 2 + n % 3]} for n in range(40)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "pairs.toml").write_text(MODEL + PROFILE, encoding="utf-8")
    profile = load_profile(folder / "pairs.toml", {"data.files": [str(folder / "a.jsonl")]})
    store, refs = Store(folder / "home"), {}

    def build(stage: Stage, make: Any) -> Path:
        refs[stage] = store.build(stage, "key", version=1, inputs=refs, config={}, make=make).ref
        return store.path(refs[stage])

    at = {Stage.TOKENIZE: build(Stage.TOKENIZE, lambda out: tokenize.run(out, profile.data, 300, silent))}
    at[Stage.QUANTIZE] = build(Stage.QUANTIZE, lambda out: quantize.run(out, profile, None, silent))
    tokens, base = at[Stage.TOKENIZE], at[Stage.QUANTIZE]
    adapter = build(Stage.ATTACH_LORA, lambda out: attach_lora.run(out, profile, base))
    work = folder / "work"
    trained = build(Stage.TRAIN, lambda out: train.run(out, profile, tokens, base, adapter, work, silent))
    at[Stage.TRAIN] = trained
    at[Stage.CHECKPOINT] = build(Stage.CHECKPOINT, lambda out: checkpoint.run(out, profile, trained, base, tokens, {}))
    release = at[Stage.CHECKPOINT]
    at[Stage.EVALUATE] = build(Stage.EVALUATE, lambda out: evaluate.run(out, profile, release, tokens, base, silent))
    return folder / "home", profile, at


def test_the_evaluation_says_what_is_preferred(made: tuple[Path, Profile, dict[Stage, Path]]) -> None:
    _, _, at = made
    books = json.loads((at[Stage.TOKENIZE] / "tokens.json").read_text())["accounting"]
    evaluation = json.loads((at[Stage.EVALUATE] / report.EVALUATION_JSON).read_text())
    found = evaluation["preference"]
    assert found["pairs"] == books["documents"]["held_out"] > 5
    assert found["accuracy"] > 0.9
    assert found["tuned_likelier"] > found["base_likelier"]
    assert found["margin"] == pytest.approx(found["reward_chosen"] - found["reward_rejected"])
    assert found["loss"] < 0.5 * preference.EVEN
    assert evaluation["verdict"]["improved"]
    assert "moved towards the chosen answer in" in evaluation["verdict"]["text"]
    assert evaluation["fine_tuned"]["tokens"] < books["held_out_counted"], "perplexity is of chosen answers"
    assert all("z" not in sample["truth"] for sample in evaluation["samples"])
    lines = [json.loads(line) for line in (at[Stage.TRAIN] / METRICS).read_text().splitlines()]
    last = [line for line in lines if "held_out_loss" in line][-1]
    assert last["held_out_accuracy"] == pytest.approx(found["accuracy"])
    assert last["held_out_loss"] == pytest.approx(found["loss"], rel=1e-4)
    page = (at[Stage.EVALUATE] / report.EVALUATION_MD).read_text()
    assert "Preference:" in page
    assert (at[Stage.EVALUATE] / report.LOSS_PNG).read_bytes().startswith(b"\x89PNG")


def test_commands_and_pages_show_it(
    made: tuple[Path, Profile, dict[Stage, Path]], tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    home, profile, at = made
    monkeypatch.setenv("MAGELLANO_HOME", str(home))
    assert cli.main(["evaluate", str(at[Stage.CHECKPOINT]), "--out", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert "moved towards the chosen answer" in out
    evaluation = json.loads((at[Stage.EVALUATE] / report.EVALUATION_JSON).read_text())
    run = {"profile": "pairs", "stages": [], "evaluation": evaluation}
    assert "### Preference:" in run_page.markdown(run, {})
    assert not preference.table({}).rows
    with pytest.raises(InputError, match="the gate judges by the loss of what is to be said"):
        check(profile)
