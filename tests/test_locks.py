"""The two locks: complete against pyproject.toml's ranges, of one mind, every file with its hash, no address."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {"requirements.lock": ["pipeline", "dev"], "requirements-peers.lock": ["exchange"]}


def entries(name: str) -> list[tuple[Requirement, int]]:
    """Each pinned requirement of a lock and how many hashes it has."""
    text = "\n".join(line for line in (ROOT / name).read_text().splitlines() if not line.startswith("#"))
    found = re.findall(r"^(\S[^\\\n]*?) \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n?)+)", text, re.MULTILINE)
    assert sum(1 + hashes.count("--hash") for _, hashes in found) == len(text.splitlines()), "a line that is neither"
    return [(Requirement(line), hashes.count("--hash")) for line, hashes in found]


def pins(name: str) -> dict[str, set[str]]:
    made: dict[str, set[str]] = {}
    for one, _ in entries(name):
        (exact,) = one.specifier
        assert exact.operator == "=="
        made.setdefault(one.name, set()).add(exact.version)
    return made


def wanted_by(extras: list[str]) -> list[Requirement]:
    """The project's own and those of its extras, which may name others of its extras."""
    found = [Requirement(r) for r in PROJECT["dependencies"]]
    for one in (Requirement(r) for extra in extras for r in PROJECT["optional-dependencies"][extra]):
        found += wanted_by(sorted(one.extras)) if one.name == PROJECT["name"] else [one]
    return found


@pytest.mark.parametrize("name", EXTRAS)
def test_what_pyproject_asks_for_is_pinned_within_its_range(name: str):
    wanted, pinned = wanted_by(EXTRAS[name]), pins(name)
    assert len(wanted) > len(PROJECT["dependencies"])
    for one in wanted:
        for version in pinned[canonicalize_name(one.name)]:
            assert one.specifier.contains(version), one


def test_both_locks_can_stand_in_one_environment():
    ours, theirs = pins("requirements.lock"), pins("requirements-peers.lock")
    common = ours.keys() & theirs.keys()
    assert {"mlx", "numpy", "datasets"} <= common
    assert {name: ours[name] for name in common} == {name: theirs[name] for name in common}


def test_torch_is_a_build_without_cuda():
    found = {str(one.marker): hashes for one, hashes in entries("requirements-peers.lock") if one.name == "torch"}
    assert found == {'sys_platform == "linux"': 6, 'sys_platform == "darwin"': 3}  # CPython 3.11, 3.12, 3.13
    assert not [n for n in pins("requirements-peers.lock") if n.startswith(("nvidia", "cuda", "triton"))]
