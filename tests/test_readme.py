"""README's tree is the project's: every tracked file has its line or its folder's, and every line exists."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LINE = re.compile(r"^(?P<indent>(?:    )*)(?P<name>[\w.\-]+/?)(?:\s{2,}\S.*)?$")


def tree() -> list[str]:
    """The paths of README's tree; a folder ends with a slash."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme.split("## Where what lies")[1].split("```")[1]
    paths: list[str] = []
    parents: list[str] = []
    for line in block.strip("\n").splitlines():
        match = LINE.match(line)
        assert match, f"README's tree: cannot read the line {line!r}"
        depth = len(match["indent"]) // 4
        parents[depth:] = [match["name"]]
        paths.append("".join(parents))
    return paths


def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: the list of tracked files is not there")
    out = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return out.splitlines()


def test_every_line_of_the_tree_exists() -> None:
    missing = [p for p in tree() if not (ROOT / p).exists() or (ROOT / p).is_dir() != p.endswith("/")]
    assert not missing, f"README's tree names what is not there: {missing}"


def test_every_tracked_file_has_a_line() -> None:
    paths = tree()
    detailed = {p for p in paths if p.endswith("/") and any(q != p and q.startswith(p) for q in paths)}
    for file in tracked():
        parents = [file[: i + 1] for i, c in enumerate(file) if c == "/"]
        closed = [p for p in parents if p in paths and p not in detailed]  # a folder shown without its files
        assert file in paths or closed, f"README's tree does not show {file}"
