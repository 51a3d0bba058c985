"""Sealed folders: the owner's alone, and trusted only where every name in the manifest is a plain file in them."""

import json
import os
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from magellano import durable, state
from magellano.artifacts import Store
from magellano.backend import mx
from magellano.names import Stage

SEAL = "manifest.json"


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077, 0o277])
def test_checkpoints_are_the_owners_alone_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        durable.private_folder(tmp_path / "home" / "work")
        if umask != 0o277:  # MLX writes what it could not read itself
            state.save(tmp_path / "home" / "work", 1, {"a": mx.zeros(3)}, {"b": mx.zeros(3)}, {})
    finally:
        os.umask(before)
    for path in (tmp_path / "home", *(tmp_path / "home").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_the_store_and_its_releases_are_the_owners_alone_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    store, before = Store(tmp_path / "home"), os.umask(umask)
    try:

        def make(out: Path) -> dict[str, object]:
            (store.work(Stage.CHECKPOINT, "k" * 32) / "left").mkdir()
            (out / "deep").mkdir()
            mx.save_safetensors(str(out / "deep" / "a.safetensors"), {"a": mx.zeros(3)})
            assert all(stat.S_IMODE(p.stat().st_mode) == 0o700 for p in (out, *list(out.parents)[:3])), "meanwhile too"
            return {}

        store.build(Stage.CHECKPOINT, "k" * 32, version=1, inputs={}, config={}, make=make)
    finally:
        os.umask(before)
    paths = [store.home, *store.home.rglob("*")]
    assert {p.name for p in paths} > {"a.safetensors", "manifest.json", "locks", f"checkpoint-{'k' * 32}", "work"}
    for path in paths:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_folder_that_was_there_keeps_its_rights(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine").chmod(0o755)
    durable.private_folder(tmp_path / "mine" / "new")
    assert stat.S_IMODE((tmp_path / "mine").stat().st_mode) == 0o755


def relist(folder: Path, old: str, new: str) -> None:
    """The manifest with a file under another name, its size and digest as they are."""
    manifest = json.loads((folder / SEAL).read_text())
    manifest["files"][new] = manifest["files"].pop(old)
    (folder / SEAL).write_text(json.dumps(manifest))


def become(make: Callable[[Path], object], name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).rename(folder.parent / "moved")
        make(folder / name)

    return change


def link(path: Path) -> None:
    path.symlink_to(path.parent.parent / "moved" if path.name != "b" else "../../moved")


STRAY: dict[str, tuple[Callable[[Path], None], str]] = {
    "a path upwards": (lambda f: relist(f, "a", "../outside"), "'../outside' is no path below it"),
    "an absolute path": (lambda f: relist(f, "a", "/etc/passwd"), "'/etc/passwd' is no path below it"),
    "a dot": (lambda f: relist(f, "a", "./a"), "'./a' is no path below it"),
    "up and down again": (lambda f: relist(f, "a", "deep/../a"), "'deep/../a' is no path below it"),
    "no name": (lambda f: relist(f, "a", ""), "'' is no path below it"),
    "NUL": (lambda f: relist(f, "a", "a\0"), "is no path below it"),
    "a name of 5,000": (lambda f: relist(f, "a", "a" * 5000), "is no path below it"),
    "a link to the same bytes": (become(link, "a"), "a is a symbolic link"),
    "a link to the same folder": (become(link, "deep"), "deep is a symbolic link"),
    "a file that is a FIFO": (become(os.mkfifo, "a"), "a is missing"),
    "a file that is a folder": (become(os.mkdir, "a"), "a is missing"),
    "a manifest that is a FIFO": (become(os.mkfifo, SEAL), "a FIFO, not a regular file"),
    "a manifest that is a link": (become(link, SEAL), "a symbolic link"),
    "a deep manifest": (lambda f: (f / SEAL).write_text("[" * 100_000) and None, "nested too deep"),
    "files a list": (lambda f: (f / SEAL).write_text('{"files": ["a"]}') and None, "is not readable"),
    "facts null": (lambda f: (f / SEAL).write_text('{"files": {"a": null}}') and None, "is not readable"),
    "a file twice": (lambda f: (f / SEAL).write_text('{"files": {"a": 1, "a": 2}}') and None, "'a' stands twice"),
}


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "a").write_text("alpha")
    (folder / "deep" / "b").write_text("beta")
    (tmp_path / "outside").write_text("alpha")
    durable.seal(folder, SEAL, {})
    return folder


@pytest.mark.parametrize("what", STRAY)
def test_a_manifest_that_leads_elsewhere_is_not_trusted(sealed: Path, what: str) -> None:
    assert durable.damage(sealed, SEAL) is None
    change, said = STRAY[what]
    change(sealed)
    assert said in str(durable.damage(sealed, SEAL))
    if "twice" not in what:
        assert durable.damage(sealed, SEAL, deep=False) is not None


def test_a_folder_that_is_a_link_is_not_trusted(sealed: Path) -> None:
    sealed.rename(sealed.parent / "moved")
    sealed.symlink_to("moved")
    assert durable.damage(sealed, SEAL) == "it is a symbolic link"


def test_a_text_is_whole_whatever_kills_its_writer(tmp_path: Path) -> None:
    """kill -9 at any moment: what stood there before, or what was written; and it can be written again."""
    path = tmp_path / "registry.json"
    texts = {"a" * 3_000_000, "b" * 4_000_000}
    code = f"""
from pathlib import Path
from magellano import durable
while True:
    for letter, count in (("a", 3_000_000), ("b", 4_000_000)):
        durable.write_text(Path({str(path)!r}), letter * count)
"""
    for delay in (0.0, 0.003, 0.01, 0.02, 0.035, 0.05):
        process = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parent.parent)
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob(f"*{process.pid}")):
            assert time.monotonic() < deadline
        time.sleep(delay)
        process.kill()
        process.wait()
        assert not path.exists() or path.read_text() in texts
    durable.write_text(path, "after")
    assert path.read_text() == "after"
    assert path.stat().st_mode & 0o777 == 0o600
