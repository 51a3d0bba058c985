"""`magellano generate` from the command line, on a small model folder."""

import io
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from magellano import cli, generate
from magellano.backend import compute_dtype
from magellano.commands.chosen import Chosen
from magellano.model import MagellanoLM
from magellano.profile import DataConfig
from magellano.sampling import Sampling
from magellano.tokenizer import Tokenizer
from tests import models

TOKENIZER = Tokenizer(models.TINY.vocab_size)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, MagellanoLM]:
    folder = tmp_path_factory.mktemp("model")
    model = models.write(folder)
    model.compute = compute_dtype("auto")  # as the command has it
    return str(folder), model


class Input(io.TextIOWrapper):
    def __init__(self, data: bytes):
        super().__init__(io.BytesIO(data))


def call(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, Any]:
    code = cli.main(["generate", *argv, "--json"])
    out, err = capsys.readouterr()
    assert code == 0, err
    return json.loads(out)


def expected(model: MagellanoLM, prompt: str, count: int, sampling: Sampling | None = None) -> str:
    tokens = generate.generate(model, TOKENIZER.encode(prompt), TOKENIZER.end_of_text, count, sampling)
    return TOKENIZER.decode(list(tokens))


def test_a_prompt_and_all_settings(made: tuple[str, MagellanoLM], capsys: pytest.CaptureFixture[str]):
    folder, model = made
    facts = call(capsys, folder, "--prompt", "Hello", "--max-tokens", "6")
    assert facts["text"] == expected(model, "Hello", 6)
    assert (facts["tokens"], facts["finish"]) == (6, "length")
    settings = ["--temperature", "0.9", "--top-k", "50", "--top-p", "0.9", "--min-p", "0.01", "--seed", "3"]
    facts = call(capsys, folder, "--prompt", "Hello", "--max-tokens", "6", *settings, "--repetition-penalty", "1.2")
    assert facts["text"] == expected(model, "Hello", 6, Sampling(0.9, 50, 0.9, 3, 0.01, 1.2))


def test_text_is_streamed_and_ends_at_a_stop(made: tuple[str, MagellanoLM], capsys: pytest.CaptureFixture[str]):
    folder, model = made
    whole = expected(model, "Hello", 8)
    stop = whole[3:5]
    assert cli.main(["generate", folder, "--prompt", "Hello", "--max-tokens", "8", "--stop", stop]) == 0
    out, err = capsys.readouterr()
    assert out == whole.split(stop)[0] + "\n"
    assert "tokens/s" in err


def test_a_prompt_from_standard_input(
    made: tuple[str, MagellanoLM], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    folder, model = made
    monkeypatch.setattr("sys.stdin", Input("two\nlines é".encode()))
    assert call(capsys, folder, "--stdin", "--max-tokens", "4")["text"] == expected(model, "two\nlines é", 4)
    monkeypatch.setattr("sys.stdin", Input(b"\xff"))
    assert cli.main(["generate", folder, "--stdin"]) == 2
    assert "standard input: not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl"])
def test_many_prompts(name: str, tmp_path: Path, made: tuple[str, MagellanoLM], capsys: pytest.CaptureFixture[str]):
    folder, model = made
    texts = ["one", "two and more", "three"]
    lines = [json.dumps({"prompt": t, "other": 1}) if name.endswith("l") else t for t in texts]
    (tmp_path / name).write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")
    argv = [folder, "--prompts", str(tmp_path / name), "--max-tokens", "5", "--batch", "2"]
    facts = call(capsys, *argv, "--temperature", "1", "--seed", "2")
    wanted = [expected(model, t, 5, Sampling(temperature=1.0, seed=2 + n)) for n, t in enumerate(texts)]
    assert [one["text"] for one in facts["completions"]] == wanted
    assert [one["prompt"] for one in facts["completions"]] == texts
    assert cli.main(["generate", *argv]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("p.txt", "\n \n", "no prompt in it"),
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": 1}\n', "line 2"),
        ("p.jsonl", "\nhello\n", "line 2"),
        ("p.jsonl", "[1]\n", "line 1"),
    ],
)
def test_files_that_are_no_prompts(
    name: str, content: str, told: str, tmp_path: Path, made: tuple[str, MagellanoLM], capsys: Any
):
    (tmp_path / name).write_text(content)
    assert cli.main(["generate", made[0], "--prompts", str(tmp_path / name)]) == 2
    assert told in capsys.readouterr().err


def test_a_state_is_kept_and_gone_on_from(
    tmp_path: Path, made: tuple[str, MagellanoLM], capsys: pytest.CaptureFixture[str]
):
    folder, model = made
    state = str(tmp_path / "s.safetensors")
    first = call(capsys, folder, "--prompt", "Once upon", "--max-tokens", "5", "--save-state", state)
    assert first["state"] == state
    on = call(capsys, folder, "--prompt", "", "--state", state, "--max-tokens", "4")
    assert first["text"] + on["text"] == expected(model, "Once upon", 9)
    more = call(capsys, folder, "--prompt", " and", "--state", state, "--max-tokens", "4")
    ids = TOKENIZER.encode("Once upon")
    ids += list(generate.generate(model, ids, TOKENIZER.end_of_text, 5)) + TOKENIZER.encode(" and")
    assert more["text"] == TOKENIZER.decode(list(generate.generate(model, ids, TOKENIZER.end_of_text, 4)))
    other = tmp_path / "other"
    models.write(other, seed=4)
    assert cli.main(["generate", str(other), "--prompt", "", "--state", state]) == 2
    assert "another model" in capsys.readouterr().err


def test_a_conversation_goes_on_from_its_state(
    tmp_path: Path, made: tuple[str, MagellanoLM], capsys: Any, monkeypatch: pytest.MonkeyPatch
):
    folder, _ = made
    state = str(tmp_path / "s.safetensors")

    def say(turns: str, *argv: str) -> list[dict[str, str]]:
        monkeypatch.setattr("sys.stdin", Input(turns.encode()))
        facts = call(capsys, folder, "--chat", "--max-tokens", "5", *argv)
        return facts["messages"]

    whole = say("Hello\n\nAnd then?\n", "--system", "Be brief.")
    assert [m["role"] for m in whole] == ["system", "user", "assistant", "user", "assistant"]
    first = say("Hello\n", "--system", "Be brief.", "--save-state", state)
    second = say("And then?\n", "--state", state)
    assert first + second == whole


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--prompts", "x", "--save-state", "s.safetensors"], "--save-state"),
        (["--prompt", "x", "--save-state", "state"], "ends in .safetensors; name it so"),
        (["--prompt", "x", "--save-state", "none/s.safetensors"], "its folder is not there; make it first"),
        (["--prompt", "x", "--system", "y"], "--system"),
        (["--prompt", "x", "--max-tokens", "0"], "max_tokens"),
        (["--prompt", "x", "--stop", ""], "stop"),
        (["--prompt", "x", "--min-p", "2"], "min_p"),
    ],
)
def test_what_does_not_go_together(argv: list[str], told: str, made: tuple[str, MagellanoLM], capsys: Any):
    assert cli.main(["generate", made[0], *argv]) == 2
    out, err = capsys.readouterr()
    assert told in err
    assert not out, "it was said before anything was made"


class Trained:
    """What `Chosen.find` gives for a release trained on such data."""

    def __init__(self, model: MagellanoLM, **data: Any):
        self.folder, self.folders, self._model = Path("release"), [], model
        profile = SimpleNamespace(data=DataConfig(format="chat", files=("a",), **data))
        self.release = SimpleNamespace(profile=profile, folder=Path())

    def model(self) -> MagellanoLM:
        return self._model

    def tokenizer(self) -> Tokenizer:
        return TOKENIZER


def test_prompts_are_rendered_as_in_training(
    made: tuple[str, MagellanoLM], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("toon_format", reason="pip install -r requirements.lock")
    folder, model = made
    monkeypatch.setattr(Chosen, "find", lambda run: Trained(model, render="toon"))
    facts = call(capsys, folder, "--prompt", '{"a": [1, 2]}', "--max-tokens", "6")
    assert facts["text"] == expected(model, "a[2]: 1,2", 6)
    assert facts["text"] != expected(model, '{"a": [1, 2]}', 6)
