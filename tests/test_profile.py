"""Profiles: all five load; whatever is wrong is refused in one line with file, key and the nearest valid name."""

from pathlib import Path

import pydantic
import pytest

from magellano import layout
from magellano.errors import InputError
from magellano.names import LoraTarget
from magellano.profile import load_profile, names, parse_override


def test_the_five_profiles_load_and_count() -> None:
    assert names() == ["demo", "phase1", "phase2", "phase3", "production3b"]
    for name in names():
        profile = load_profile(name)
        assert profile.name == name
        assert 0 < layout.lora_count(profile.model, profile.lora) < layout.count(profile.model)


def test_a_profile_is_frozen() -> None:
    with pytest.raises(pydantic.ValidationError, match="frozen"):
        load_profile("demo").train.steps = 3  # type: ignore[misc]


def test_overrides_reach_every_depth() -> None:
    profile = load_profile("demo", {"train.steps": 77, "pretrain.train.lr": 0.5, "lora.ranks": {"head": 3}})
    assert profile.train.steps == 77
    assert profile.pretrain is not None
    assert profile.pretrain.train.lr == 0.5
    assert profile.lora.rank_of(LoraTarget.HEAD) == 3
    assert profile.lora.rank_of(LoraTarget.W1) == profile.lora.rank


@pytest.mark.parametrize(
    ("name", "overrides", "said"),
    [
        ("demoo", {}, r"unknown profile 'demoo'; did you mean 'demo'\?"),
        ("no/such.toml", {}, r"no/such\.toml: no such profile file"),
        ("demo", {"train.stepz": 1}, r"override train\.stepz: unknown key; did you mean 'train\.steps'\?"),
        ("demo", {"trian.steps": 1}, r"did you mean 'train\.steps'\?"),
        ("demo", {"train": 3}, r"override train: is a section"),
        ("demo", {"train.steps.x": 3}, r"steps is a value, not a section"),
        ("demo", {"name": "x"}, r"override name: unknown key"),
        ("demo", {"train.steps": "ten"}, r"train\.steps: Input should be a valid integer \(got 'ten'\)"),
        ("demo", {"train.steps": True}, r"train\.steps: Input should be a valid integer"),
        ("demo", {"train.steps": 0}, r"train\.steps: Input should be greater than 0"),
        ("demo", {"train.lr": float("nan")}, r"train\.lr"),
        ("demo", {"train.compute": "float8"}, r"train\.compute.*'float32'"),
        ("demo", {"loss.kind": "reny"}, r"override: loss\.kind: .*'renyi'; did you mean 'renyi'\? \(got 'reny'\)"),
        ("demo", {"loss.kind": "crossentropy"}, r"did you mean 'cross_entropy'\?"),
        ("demo", {"loss.kin": "renyi"}, r"override loss\.kin: unknown key; did you mean 'loss\.kind'\?"),
        ("demo", {"loss.alpha": 0.0}, r"loss\.alpha: Input should be greater than 0"),
        ("demo", {"loss.alpha": 4.5}, r"loss\.alpha: Input should be less than or equal to 4"),
        ("demo", {"loss.beta": -0.1}, r"loss\.beta: Input should be greater than or equal to 0"),
        ("demo", {"lora.targets": ["in_prj"]}, r"lora\.targets\.0.*'in_proj'"),
        ("demo", {"lora.targets": []}, r"targets is empty"),
        ("demo", {"lora.rank_pattern": {"in_prj": 3}}, r"names 'in_prj'; the targets are in_proj, .*layers\.N-M"),
        ("demo", {"lora.rank_pattern": {"layers.2.q": 3}}, r"names 'q'; the targets are in_proj"),
        ("demo", {"lora.rank_pattern": {"layers.2-1": 3}}, r"layers\.2-1: the layers run backwards"),
        ("demo", {"lora.rank_pattern": {"layers.8": 3}}, r"layers\.8 matches no projection .* layers are 0 to 7"),
        ("demo", {"lora.rank_pattern": {"layers.3.in_proj": 3}}, r"layers\.3\.in_proj matches no projection"),
        ("demo", {"lora.rank_pattern": {"layers.0-2": 3, "layers.2": 4}}, r"layers\.0-2 and layers\.2 give"),
        ("demo", {"lora.rank_pattern": {"w1": 3}, "lora.ranks": {"w1": 4}}, r"w1 stands in ranks and in rank_pattern"),
        ("demo", {"lora.rank_pattern": {"w1": 3}, "lora.targets": ["w2"]}, r"w1 is not among targets"),
        ("demo", {"lora.targets": ["w1"], "lora.ranks": {"w2": 4}}, r"ranks names \['w2'\]"),
        ("demo", {"model.top_k": 9}, r"top_k 9 is more than n_experts 4; lower top_k"),
        ("demo", {"model.moe_every": 1}, r"moe_every must be 2 or more"),
        ("demo", {"model.vocab_size": 70000}, r"model\.vocab_size: Input should be less than or equal to 65536"),
        ("demo", {"train.steps": 5, "train.warmup": 9}, r"warmup 9 is more than steps 5"),
        ("demo", {"base.source": "folder"}, r'source "folder" and the key folder belong together'),
        ("phase2", {"base.source": "pretrain"}, r"there is no \[pretrain\] section; add one"),
        ("demo", {"data.files": []}, r"exactly one of files and hub"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(name: str, overrides: dict, said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        load_profile(name, overrides)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[model\n", r"p\.toml: not valid TOML"),
        ("[modle]\nd_model = 3\n", r"p\.toml: modle: unknown key; did you mean 'model'\?"),
        ("[model]\nd_modle = 3\n", r"p\.toml: \[model\]: d_modle: unknown key; did you mean 'd_model'\?"),
        ('name = "x"\n', r"name: a profile's name is its file's name"),
        ("[model]\nd_model = 8\nn_layers = 1\nd_ff = 8\n", r"p\.toml: data: this key is required; add it"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "p.toml").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=said):
        load_profile(tmp_path / "p.toml")


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "p.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not valid TOML"):
        load_profile(tmp_path / "p.toml")


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("train.steps=10", ("train.steps", 10)),
        ("train.lr=1e-3", ("train.lr", 1e-3)),
        ('data.files=["a","b"]', ("data.files", ["a", "b"])),
        ("train.compute=float16", ("train.compute", "float16")),
        ("base.folder=a=b", ("base.folder", "a=b")),
    ],
)
def test_overrides_from_a_command_line(text: str, parsed: tuple) -> None:
    assert parse_override(text) == parsed


@pytest.mark.parametrize("text", ["train.steps", "=3", ""])
def test_an_override_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(InputError, match=r"section\.key=value"):
        parse_override(text)
