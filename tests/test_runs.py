"""A release that somebody else made: what it names is checked before it is followed; the command line exits with 2."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from magellano import cli, lora
from magellano.artifacts import MANIFEST
from magellano.backend import mx
from magellano.errors import ExitCode
from magellano.names import Stage
from magellano.profile import load_profile
from magellano.stages.checkpoint import PROFILE


def put(name: str, text: str | bytes) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode()) and None


def become(make: Callable[[Path], object], name: str) -> Callable[[Path], None]:
    def replace(folder: Path) -> None:
        (folder / name).rename(folder / "moved")
        make(folder / name)

    return replace


def named(key: object) -> Callable[[Path], None]:
    return put(MANIFEST, json.dumps({"inputs": {"tokens": {"stage": Stage.TOKENIZE, "key": key}}}))


HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "tokens upwards": (named("../../../etc"), "inputs: '../../../etc' is no key"),
    "tokens absolute": (named("/etc"), "inputs: '/etc' is no key"),
    "tokens ..": (named(".."), "inputs: '..' is no key"),
    "tokens a list": (named(["x"]), "inputs: ['x'] is no key"),
    "tokens of 5,000": (named("x" * 5000), "is no key"),
    "a deep manifest": (put(MANIFEST, '{"inputs":' * 100_000), "nested too deep"),
    "a manifest that is a FIFO": (become(os.mkfifo, MANIFEST), "a FIFO, not a regular file"),
    "a profile without model": (put(PROFILE, '{"name":"x"}'), "model: Field required"),
    "a profile that is a list": (put(PROFILE, "[]"), "not a JSON object but []"),
    "a profile that is a FIFO": (become(os.mkfifo, PROFILE), "a FIFO, not a regular file"),
    "a profile that is a link": (become(lambda p: p.symlink_to("moved"), PROFILE), "a symbolic link"),
    "a base elsewhere": (put(lora.CONFIG, '{"base_model_name_or_path":"/etc"}'), "leaves the artifact store"),
    "a config of bytes": (put(lora.CONFIG, b"\xff\xff"), "not UTF-8"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_release_ends_with_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str) -> None:
    profile = load_profile("demo")
    for name in (Stage.TOKENIZE, Stage.QUANTIZE):
        (tmp_path / name / "x").mkdir(parents=True)
    folder = tmp_path / Stage.CHECKPOINT / "release"
    folder.mkdir(parents=True)
    lora.save(folder, profile.model, profile.lora, {"x.lora_a": mx.zeros((2, 3))}, base="../../quantize/x")
    (folder / PROFILE).write_text(profile.model_dump_json())
    named("x")(folder)
    make, said = HOSTILE[what]
    make(folder)
    assert cli.main(["evaluate", str(folder), "--out", str(tmp_path / "out")]) == ExitCode.BAD_INPUT
    err = capsys.readouterr().err.strip()
    assert said in err.replace("\n", " ")
    assert str(folder) in err
    assert "Traceback" not in err
