"""The artifact store: whole or not there, built once, never trusted when damaged."""

import errno
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from magellano import artifacts, durable, pipeline
from magellano.artifacts import ASIDE, MANIFEST, ArtifactRef, Built, Store, stage_key
from magellano.errors import DiskFull
from magellano.names import METRICS, LoraTarget, Stage
from magellano.profile import load_profile

STAGE, KEY = Stage.QUANTIZE, "k" * 32
ROOT = Path(__file__).parent.parent


class Maker:
    """Writes two files and counts its calls."""

    def __init__(self, text: str = "weights"):
        self.calls, self.text = 0, text

    def __call__(self, out: Path) -> dict[str, object]:
        self.calls += 1
        (out / "deep").mkdir()
        (out / "deep" / "a.bin").write_text(self.text)
        (out / "b.json").write_text("{}")
        return {"loss": 1.5, "calls": self.calls}


def build(store: Store, make, key: str = KEY, rerun: str = "") -> Built:
    return store.build(STAGE, key, version=1, inputs={"base": "d1"}, config={"a": 1}, make=make, rerun=rerun)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "home")


def leftovers(store: Store) -> list[str]:
    return [p.name for p in (store.home / "artifacts" / STAGE).iterdir() if p.name.startswith(".tmp")]


def test_builds_once_then_reuses(store):
    make = Maker()
    first, second = build(store, make), build(store, make)
    assert (first.reused, second.reused, make.calls) == (False, True, 1)
    assert first.ref == second.ref == store.find(STAGE, KEY)
    assert first.ref.bytes == len("weights") + 2
    assert ArtifactRef.model_validate_json(first.ref.model_dump_json()) == first.ref
    assert leftovers(store) == []


def test_manifest_says_what_it_is(store):
    manifest = store.manifest(build(store, Maker()).ref)
    assert manifest["schema"] == artifacts.SCHEMA
    assert (manifest["stage"], manifest["key"], manifest["version"]) == (STAGE, KEY, 1)
    assert manifest["config"] == {"a": 1}
    assert manifest["inputs"] == {"base": "d1"}
    assert manifest["summary"] == {"loss": 1.5, "calls": 1}
    assert set(manifest["files"]) == {"b.json", "deep/a.bin"}
    assert manifest["files"]["b.json"]["bytes"] == 2
    assert manifest["platform"]["python"] == ".".join(map(str, sys.version_info[:3]))
    assert set(manifest["code"]) == {"version", "commit"}


def test_owner_alone_may_read(store):
    folder = store.path(build(store, Maker()).ref)
    for path in [*folder.rglob("*"), folder, *list(folder.parents)[:3]]:
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_digest_is_of_the_content_alone(store, tmp_path):
    other = Store(tmp_path / "elsewhere")
    same = other.build(Stage.TRAIN, "z" * 32, version=7, inputs={}, config={}, make=Maker())
    assert same.ref.digest == build(store, Maker()).ref.digest
    assert build(store, Maker("other"), key="o" * 32).ref.digest != same.ref.digest


def test_measured_times_are_not_part_of_a_reference(store, tmp_path):
    """Releases record the references of what they came from: a rerun that took longer must give the same release."""

    def make(seconds: float):
        def write(out: Path) -> dict[str, object]:
            (out / METRICS).write_text(json.dumps({"seconds": seconds}))
            (out / "weights").write_text("w")
            return {}

        return write

    first = build(store, make(1.0)).ref
    assert build(store, make(1234.5678), rerun="again").ref == first


def test_a_moved_home_keeps_its_artifacts(store, tmp_path):
    ref = build(store, Maker()).ref
    store.home.rename(tmp_path / "moved")
    assert Store(tmp_path / "moved").find(STAGE, KEY) == ref


def cut(folder: Path) -> None:
    os.truncate(folder / "deep" / "a.bin", 3)


def flip(folder: Path) -> None:
    (folder / "deep" / "a.bin").write_text("weighty")


def drop(folder: Path) -> None:
    (folder / "b.json").unlink()


def no_manifest(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def torn_manifest(folder: Path) -> None:
    os.truncate(folder / MANIFEST, 40)


def other_schema(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "schema": 99}))


def someone_elses(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**manifest, "key": "x" * 32}))


@pytest.mark.parametrize("damage", [cut, flip, drop, no_manifest, torn_manifest, other_schema, someone_elses])
def test_damage_is_set_aside_and_built_again(store, damage, caplog):
    make = Maker()
    ref = build(store, make).ref
    for time_ in (1, 2):
        damage(store.path(ref))
        caplog.clear()
        assert store.find(STAGE, KEY) is None
        assert "is damaged" in caplog.text
        aside = store.home / "artifacts" / STAGE / ASIDE
        assert sorted(p.name for p in aside.iterdir()) == [f"{KEY}-{n}" for n in range(time_)]
        again = build(store, make)
        assert (again.reused, again.ref, make.calls) == (False, ref, 1 + time_)


def test_sizes_alone_when_asked(store):
    ref = build(store, Maker()).ref
    flip(store.path(ref))
    assert Store(store.home, deep=False).find(STAGE, KEY) == ref
    cut(store.path(ref))
    assert Store(store.home, deep=False).find(STAGE, KEY) is None


def test_a_failure_leaves_nothing(store):
    def make(out: Path) -> dict[str, object]:
        (out / "half").write_bytes(bytes(1000))
        raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"):
        build(store, make)
    assert leftovers(store) == []
    assert store.find(STAGE, KEY) is None


def test_a_full_disk_is_one_line_with_numbers(store):
    def make(out: Path) -> dict[str, object]:
        (out / "half").write_bytes(bytes(1_000_000))
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(
        DiskFull, match=r"artifacts/quantize.*at least 2,048,576 bytes are needed and [\d,]+ are free"
    ) as e:
        build(store, make)
    assert "\n" not in str(e.value)
    assert leftovers(store) == []


@pytest.mark.parametrize(("number", "told"), [(errno.EIO, OSError), (errno.ENOSPC, DiskFull)])
def test_a_failure_after_the_rename_is_told_as_what_it_is(store, monkeypatch, number, told):
    """The last fsync fails when the temporary folder has its final name: there is nothing to measure under the old."""
    fsync = durable.fsync

    def fails(path: Path) -> None:
        if path == store.home / "artifacts" / STAGE:
            raise OSError(number, "failed")
        fsync(path)

    monkeypatch.setattr(durable, "fsync", fails)
    with pytest.raises(told) as e:
        build(store, Maker())
    assert not isinstance(e.value, FileNotFoundError)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a tiny disk")
def test_a_really_full_disk(tmp_path):
    home = tmp_path / "small"
    home.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", home], capture_output=True).returncode:
        pytest.skip("may not mount")
    try:
        from magellano.backend import mx

        small = Store(home)
        kept = build(small, Maker())

        def make(out: Path) -> dict[str, object]:
            mx.save_safetensors(str(out / "big.safetensors"), {"w": mx.zeros((2_000_000,))})  # fails without an errno
            return {}

        with pytest.raises(DiskFull, match="the disk is full"):
            build(small, make, key="b" * 32)
        assert leftovers(small) == []
        assert small.find(STAGE, KEY) == kept.ref
    finally:
        subprocess.run(["umount", home], check=True)


def test_links_are_no_content(store, tmp_path):
    def make(out: Path) -> dict[str, object]:
        (out / "link").symlink_to(tmp_path)
        return {}

    with pytest.raises(AssertionError, match="neither a file nor a folder"):
        build(store, make)


def test_rerun_builds_again_once_per_id(store):
    make = Maker()
    build(store, make)
    make.text = "better"
    again = build(store, make, rerun="run-1")
    assert (again.reused, make.calls) == (False, 2)
    assert (store.path(again.ref) / "deep" / "a.bin").read_text() == "better"
    assert build(store, make, rerun="run-1").reused, "the same run, retried, has it already"
    assert build(store, make).reused
    assert not build(store, make, rerun="run-2").reused
    assert leftovers(store) == []


def test_a_failed_rerun_keeps_what_was_there(store):
    ref = build(store, Maker()).ref

    def make(out: Path) -> dict[str, object]:
        raise RuntimeError("no")

    with pytest.raises(RuntimeError):
        build(store, make, rerun="run-1")
    assert store.find(STAGE, KEY) == ref


def test_work_stays_after_a_failure_and_goes_after_the_commit(store):
    def stops(out: Path) -> dict[str, object]:
        (store.work(STAGE, KEY) / "step-1").write_text("state")
        raise RuntimeError("stopped")

    def continues(out: Path) -> dict[str, object]:
        (out / "end").write_text((store.work(STAGE, KEY) / "step-1").read_text())
        return {}

    with pytest.raises(RuntimeError):
        build(store, stops)
    assert (store.path(build(store, continues).ref) / "end").read_text() == "state"
    assert not (store.home / "work" / STAGE / KEY).exists()


def test_work_left_by_a_kill_right_after_the_commit_goes_with_the_next_use(store):
    build(store, Maker())
    (store.work(STAGE, KEY) / "step-1").write_text("state")
    assert build(store, Maker()).reused
    assert not (store.home / "work" / STAGE / KEY).exists()


@pytest.mark.parametrize("key", [KEY, "n" * 32], ids=["its own next build", "another key's build"])
def test_a_rerun_that_dies_before_its_artifact_stands_leaves_the_old_one(store, key, monkeypatch):
    ref = build(store, Maker()).ref

    def fails(temporary: Path, final: Path) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(durable, "publish", fails)
        with pytest.raises(OSError, match="Input/output"):
            build(store, Maker("better"), rerun="run-1")
    again = build(store, Maker(), key=key)
    assert again.reused == (key == KEY)
    assert store.find(STAGE, KEY) == ref
    assert leftovers(store) == []


def test_keys_are_stable_and_depend_on_everything():
    ref = ArtifactRef(stage=Stage.TRAIN, key="k", digest="d", bytes=1)
    arguments = (Stage.TRAIN, 1, {"lr": 1e-3, "targets": (LoraTarget.W1,), "x": None}, {"a": ref, "b": "e"})
    key = stage_key(*arguments)
    assert key == "7c40a187b21404bb19fa9e91e39ba1ca", "a change here makes every artifact of every user stale"
    assert key == stage_key(Stage.TRAIN, 1, {"x": None, "targets": ["w1"], "lr": 1e-3}, {"b": "e", "a": "d"})
    moved = ref.model_copy(update={"key": "other", "bytes": 2})
    assert key == stage_key(*arguments[:3], {"a": moved, "b": "e"}), "content counts, not its key"
    others = [
        stage_key(Stage.EVALUATE, *arguments[1:]),
        stage_key(Stage.TRAIN, 2, *arguments[2:]),
        stage_key(*arguments[:2], {**arguments[2], "lr": 2e-3}, arguments[3]),
        stage_key(*arguments[:3], {"a": ref, "b": "f"}),
        stage_key(*arguments[:3], {"a": ref}),
    ]
    assert len({key, *others}) == 6


@pytest.mark.parametrize("odd", [{1, 2}, Path("x"), b"x", object(), {1: 2}])
def test_odd_types_have_no_key(odd):
    with pytest.raises(TypeError, match="may not"):
        stage_key(Stage.TRAIN, 1, {"odd": odd}, {})


def test_nan_has_no_key():
    with pytest.raises(ValueError, match="JSON compliant"):
        stage_key(Stage.TRAIN, 1, {"odd": float("nan")}, {})


def changed(stage: Stage, override: str, value: object) -> bool:
    """Whether `override` changes what `stage` depends on, its inputs apart."""
    plain, other = load_profile("demo"), load_profile("demo", {override: value})
    keys = [
        stage_key(stage, 1, pipeline.settings(stage, p, p.data if stage is Stage.TOKENIZE else None), {})
        for p in (plain, other)
    ]
    return keys[0] != keys[1]


@pytest.mark.parametrize(
    ("override", "value", "stages"),
    [
        ("train.steps", 77, {Stage.TRAIN}),
        ("lora.rank", 3, {Stage.ATTACH_LORA}),
        ("lora.rslora", True, {Stage.ATTACH_LORA}),
        ("lora.rank_pattern", {"layers.1": 3}, {Stage.ATTACH_LORA}),
        ("lora.init", "loftq", {Stage.ATTACH_LORA}),
        ("lora", {"kind": "dora", "targets": ["w1", "w2"]}, {Stage.ATTACH_LORA}),
        ("lora.plus", 8.0, {Stage.TRAIN}),
        ("data.seq_len", 64, {Stage.TOKENIZE}),
        ("data.render", "toon", {Stage.TOKENIZE}),
        ("data.files", ["elsewhere.jsonl"], set()),  # the content counts
        ("model.d_ff", 64, {Stage.PRETRAIN, Stage.QUANTIZE}),
        ("base.seed", 5, {Stage.PRETRAIN}),
        ("pretrain.train.lr", 1e-4, {Stage.PRETRAIN}),
        ("quantize.embedding", False, {Stage.QUANTIZE}),
        ("loss.kind", "renyi", {Stage.PRETRAIN, Stage.TRAIN}),
        ("loss.beta", 0.5, set()),  # cross-entropy has none
        ("evaluate.samples", 1, {Stage.EVALUATE}),
        ("memory.limit_gib", 9.0, set()),
        ("description", "other", set()),
    ],
)
def test_a_setting_touches_its_own_stages_alone(override, value, stages):
    assert {stage for stage in Stage if changed(stage, override, value)} == stages


def test_reruns_take_their_dependents_along():
    assert pipeline.with_dependents([]) == frozenset()
    assert pipeline.with_dependents([Stage.EVALUATE]) == {Stage.EVALUATE}
    assert pipeline.with_dependents([Stage.TOKENIZE]) == {Stage.TOKENIZE, Stage.TRAIN, Stage.CHECKPOINT, Stage.EVALUATE}
    assert pipeline.with_dependents([Stage.QUANTIZE]) == set(Stage) - {Stage.TOKENIZE, Stage.PRETRAIN}
    assert set(pipeline.STAGES) == set(Stage)
