"""What goes and what stays: the promoted, the last runs and releases, and all that they were made from."""

import json
import os
import time
from pathlib import Path

import pytest

from magellano import cli, gc, registry
from magellano.artifacts import ArtifactRef, Inputs, Store, stage_key
from magellano.errors import ExitCode, InputError
from magellano.ledger import Run
from magellano.names import Decision, Stage
from magellano.profile import load_profile
from magellano.registry import Entry, HeldOut

SIZE = 1000


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MAGELLANO_HOME", str(tmp_path))
    return tmp_path


def make(stage: Stage, name: str, **inputs: ArtifactRef) -> ArtifactRef:
    """An artifact with content of its own."""

    def write(out: Path) -> dict[str, str]:
        (out / "file").write_bytes(name.encode().ljust(SIZE, b"."))
        return {}

    named: Inputs = inputs
    config = {"profile": "demo", "name": name}
    key = stage_key(stage, 1, config, named)
    return Store(registry.path().parent).build(stage, key, version=1, inputs=named, config=config, make=write).ref


def chain(name: str, base: ArtifactRef) -> list[ArtifactRef]:
    """Tokens, training and release of one run on a base."""
    tokens = make(Stage.TOKENIZE, name)
    trained = make(Stage.TRAIN, name, tokens=tokens, base=base)
    return [tokens, trained, make(Stage.CHECKPOINT, name, trained=trained, base=base, tokens=tokens)]


def record(name: str, refs: list[ArtifactRef]) -> None:
    with Run("train", load_profile("demo"), name, {}) as run:
        for ref in refs:
            run.stage(ref.stage, ref, reused=False, seconds=0.0)


def promote(release: ArtifactRef, tokens: ArtifactRef | None = None) -> None:
    facts = {"run": 1, "decided": "", "reason": "", "made": "", "numbers": {}, "lineage": {}}
    entry = Entry(release=release.key, digest=release.digest, decision=Decision.PROMOTED, **facts)  # type: ignore[arg-type]
    with registry.changed() as book:
        book.shelf("demo").judge(entry)
        if tokens is not None:
            book.shelf("demo").held_out = HeldOut(ref=tokens, since="", split={})


def there() -> set[str]:
    """Artifacts by stage and the name in their content."""
    files = (registry.path().parent / "artifacts").glob("*/*/file")
    return {f"{f.parent.parent.name} {f.read_text().rstrip('.')}" for f in files}


def everything(*names: str) -> set[str]:
    return {f"{stage} {name}" for stage in (Stage.TOKENIZE, Stage.TRAIN, Stage.CHECKPOINT) for name in names}


@pytest.fixture
def five() -> list[list[ArtifactRef]]:
    """Runs r0 to r4 on one base, whose pretraining only it names; r1 was promoted; the fixed set is that of r0."""
    pretrained = make(Stage.PRETRAIN, "base")
    base = make(Stage.QUANTIZE, "base", base=pretrained)
    make(Stage.QUANTIZE, "another base")
    runs = []
    for n in range(5):
        runs.append(chain(f"r{n}", base))
        record(f"r{n}", runs[-1])
        for ref in runs[-1]:
            when = time.time() - 1000 + 10 * n
            os.utime(Store(registry.path().parent).path(ref) / "manifest.json", (when, when))
    promote(runs[1][2], runs[0][0])
    return runs


def test_what_stays(five: list[list[ArtifactRef]], capsys: pytest.CaptureFixture[str]) -> None:
    before = there()
    assert cli.main(["gc", "--json"]) == ExitCode.DONE
    facts = json.loads(capsys.readouterr().out)
    assert there() == before, "without --yes it is only listed"
    assert facts["removed"] is False
    assert cli.main(["gc", "--yes"]) == ExitCode.DONE
    kept = {"pretrain base", "quantize base", *everything("r1", "r3", "r4"), "tokenize r0"}
    assert there() == kept
    assert len(facts["kept"]) == len(kept)
    assert len(facts["items"]) == len(before) - len(kept)
    assert facts["bytes"] > SIZE * len(facts["items"])
    assert gc.plan() == []
    store = Store(registry.path().parent)
    assert all(store.find(ref.stage, ref.key) for ref in [*five[1], *five[3], *five[4]]), "whole, to the last byte"


def test_what_went_is_built_again(five: list[list[ArtifactRef]]) -> None:
    gc.remove(gc.plan())
    base = make(Stage.QUANTIZE, "base", base=make(Stage.PRETRAIN, "base"))
    assert chain("r2", base) == five[2]


def test_nothing_goes_while_a_run_goes_on(
    five: list[list[ArtifactRef]], capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    before = there()
    with Run("train", load_profile("demo"), "now", {}):
        assert cli.main(["gc", "--yes"]) == ExitCode.BAD_INPUT
    assert "a run is going on" in capsys.readouterr().err
    assert there() == before


def test_the_budget_takes_the_oldest_and_no_more_than_needed(five: list[list[ArtifactRef]], home: Path) -> None:
    items = gc.plan()
    total = sum(f.stat().st_size for f in home.rglob("*") if f.is_file())
    found = gc.to_budget(total - items[0].bytes - 1)
    assert found["removed"] == [str(item.path) for item in items[:2]]
    assert found["bytes"] <= total - items[0].bytes - 1
    assert gc.to_budget(total)["removed"] == []
    assert gc.to_budget(1)["bytes"] > 1, "what is kept is not given up for it"
    assert everything("r1", "r3", "r4") < there()


def test_leftovers(home: Path) -> None:
    for name in (".tmp-dead", ".aside/bad-0"):
        (home / "artifacts" / "train" / name).mkdir(parents=True)
    for name, days in (("old", 8), ("young", 6)):
        folder = home / "work" / "train" / name
        folder.mkdir(parents=True)
        os.utime(folder, (time.time() - days * 86400,) * 2)
    (home / "evaluations" / "gone").mkdir(parents=True)
    assert {item.path.name for item in gc.plan()} == {".tmp-dead", "bad-0", "old", "gone"}
    gc.remove(gc.plan())
    assert (home / "work" / "train" / "young").is_dir()
    assert not (home / "work" / "train" / "old").exists()
    with pytest.raises(InputError, match="at least one run"):
        gc.plan(keep=0)
