"""Several adapters over one base: each gives the tokens that it gives alone, in Python and on the command line."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magellano import cli, generate, loader, lora, merge
from magellano.adapters import Adapters
from magellano.backend import mx
from magellano.errors import InputError
from magellano.layout import parameters
from magellano.lora_config import LoraConfig
from magellano.profile import Profile, load_profile
from magellano.progress import silent
from magellano.stages import quantize
from magellano.stages.checkpoint import PROFILE
from magellano.tokenizer import Tokenizer
from tests import models
from tests.tiny import MODEL

TOKENS = mx.array(np.random.default_rng(0).integers(0, 300, (2, 12)))
SETTINGS = {
    "one": LoraConfig(rank=4, alpha=12.0),
    "two": LoraConfig(rank=3, targets=("in_proj", "w1"), rank_pattern={"layers.1": 5}),
    "dora": LoraConfig(kind="dora", rank=2, targets=("out_proj", "w2")),
}
END, COUNT = 299, 5


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """artifacts/ with a quantised base and a release of each of SETTINGS on it."""
    folder = tmp_path_factory.mktemp("store")
    (folder / "tiny.toml").write_text(MODEL + '[data]\nfiles = ["x.txt"]\n[train]\nsteps = 10\n')
    profile = load_profile(folder / "tiny.toml")
    base = folder / "quantize" / "key"
    base.mkdir(parents=True)
    quantize.run(base, profile, None, silent)
    for n, (name, settings) in enumerate(SETTINGS.items()):
        release(folder / "checkpoint" / name, profile, settings, base, n)
    return folder


def release(out: Path, profile: Profile, settings: LoraConfig, base: Path, seed: int) -> None:
    out.mkdir(parents=True)
    tensors = models.adapter(profile.model, settings, seed, loader.Files(base))
    tensors = {name: value if name.endswith("lora_m") else 8 * value for name, value in tensors.items()}
    lora.save(out, profile.model, settings, tensors, base=f"../../quantize/{base.name}")
    (out / PROFILE).write_text(profile.model_copy(update={"lora": settings}).model_dump_json())
    shutil.copyfile(base / loader.CONFIG, out / loader.CONFIG)
    Tokenizer(profile.model.vocab_size).save(out)


def alone(store: Path, name: str, prompt: list[int]) -> list[int]:
    base = store / "quantize" / "key"
    model = loader.load_model(base) if name == "base" else loader.load_release(store / "checkpoint" / name, base)
    return list(generate.generate(model, prompt, END, COUNT))


def test_switching_gives_each_adapter_s_tokens(store: Path) -> None:
    base = store / "quantize" / "key"
    adapters = Adapters(loader.load_model(base), base)
    for name in SETTINGS:
        adapters.add(name, store / "checkpoint" / name)
    wanted = {name: alone(store, name, [5, 6, 7]) for name in (*SETTINGS, "base")}
    assert len(set(map(tuple, wanted.values()))) == 4, "they differ, or the test would hold nothing"
    for name in ("one", "base", "dora", "two", "one", "dora", "base", "two"):
        model = adapters.use(None if name == "base" else name)
        assert list(generate.generate(model, [5, 6, 7], END, COUNT)) == wanted[name], name
    assert adapters.names == list(SETTINGS)


def test_a_blend_is_the_weighted_sum_of_the_changes(store: Path) -> None:
    base = store / "quantize" / "key"
    adapters = Adapters(loader.load_model(base), base)
    adapters.add("one", store / "checkpoint" / "one")
    adapters.add("two", store / "checkpoint" / "two")
    adapters.blend("both", {"one": 0.75, "two": -0.5})

    def weights(name: str | None) -> dict[str, mx.array]:
        model = adapters.use(name)
        specs = [spec for spec in parameters(model.config) if spec.target is not None]
        return {s.name: merge.weight(lora.find(model, lora.module_path(s))) for s in specs}

    plain, one, two, both = map(weights, (None, "one", "two", "both"))
    for name, w in plain.items():
        wanted = w + 0.75 * (one[name] - w) - 0.5 * (two[name] - w)
        assert mx.allclose(both[name], wanted, rtol=1e-4, atol=1e-5).item(), name
        assert mx.any(one[name] != w).item()
    adapters.add("dora", store / "checkpoint" / "dora")
    with pytest.raises(InputError, match="cannot be blended"):
        adapters.blend("no", {"one": 1.0, "dora": 1.0})


def test_another_base_and_taken_names_are_refused(store: Path, tmp_path: Path) -> None:
    base = store / "quantize" / "key"
    adapters = Adapters(loader.load_model(base), base)
    shutil.copytree(store, tmp_path / "copy")
    adapters.add("copied", tmp_path / "copy" / "checkpoint" / "one")  # the same files elsewhere
    other = next((tmp_path / "copy" / "quantize" / "key").glob("*.safetensors"))
    data = bytearray(other.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    with pytest.raises(InputError, match=r"its base .* the files differ; adapters that are loaded together"):
        adapters.add("other", tmp_path / "copy" / "checkpoint" / "two")
    with pytest.raises(InputError, match="the name is taken"):
        adapters.add("copied", store / "checkpoint" / "two")
    with pytest.raises(InputError, match="adapter none: not loaded; there is copied"):
        adapters.use("none")


def call(capsys: pytest.CaptureFixture[str], store: Path, *argv: str, code: int = 0) -> Any:
    run = [str(store / "checkpoint" / "one"), "--max-tokens", str(COUNT)]
    others = [f"--adapter={name}={store / 'checkpoint' / name}" for name in ("two", "dora")]
    assert cli.main(["generate", *run, *others, *argv, *([] if code else ["--json"])]) == code
    out, err = capsys.readouterr()
    return err if code else json.loads(out)


def test_the_command_line_chooses_by_flag_and_by_line(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = Tokenizer(300)

    def wanted(name: str, prompt: str) -> str:
        return tokenizer.decode(alone(store, name, tokenizer.encode(prompt)))

    for flag, name in (((), "one"), (("--use", "dora"), "dora")):
        assert call(capsys, store, "--prompt", "Hello", *flag)["text"] == wanted(name, "Hello")
    rows = [("a", "two"), ("b", "two"), ("c", None), ("d", "base"), ("e", "run")]
    lines = [json.dumps({"prompt": text} | ({} if name is None else {"adapter": name})) for text, name in rows]
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    made = call(capsys, store, "--prompts", str(tmp_path / "p.jsonl"), "--use", "two")["completions"]
    named = [("run" if name == "run" else name or "two") for _, name in rows]
    assert [one["adapter"] for one in made] == named
    assert [one["text"] for one in made] == [
        wanted("one" if name == "run" else name, text) for (text, _), name in zip(rows, named, strict=True)
    ]
    (tmp_path / "p.jsonl").write_text('{"prompt": "x"}\n{"prompt": "x", "adapter": "three"}')
    said = call(capsys, store, "--prompts", str(tmp_path / "p.jsonl"), code=2)
    assert "p.jsonl: line 2: no adapter three; there is base, run, two, dora" in said
    whole = call(capsys, store, "--prompt", "Hello", "--blend", "mix=run:1.0,two:0.0", "--use", "mix")
    assert whole["text"] == wanted("one", "Hello")


@pytest.mark.parametrize(
    ("argv", "told"),
    [
        (["--use", "three"], "--use: no adapter three"),
        (["--adapter", "two"], "two: not of the form NAME="),
        (["--adapter", "run=x"], "run: this adapter's name is taken"),
        (["--blend", "mix=run:half"], "run:half is not NAME:WEIGHT"),
        (["--blend", "mix=four:1"], "adapter four: not loaded"),
        (["--blend", "mix=run:1,dora:1"], "cannot be blended"),
        (["--blend", "mix=run:1", "--use", "mix", "--save-state", "s.safetensors"], "not to a blend"),
    ],
)
def test_what_means_nothing_is_refused(
    argv: list[str], told: str, store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told in call(capsys, store, "--prompt", "x", *argv, code=2)
