"""What is written as TOML reads back equal; a profile written so is the same profile."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magellano import toml
from magellano.profile import load_profile, names

PLAIN = (
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"]))
)
VALUES = PLAIN | st.lists(PLAIN, max_size=4)
KEYS = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
TABLES = st.recursive(
    st.dictionaries(KEYS, VALUES, max_size=4), lambda inner: st.dictionaries(KEYS, VALUES | inner, max_size=4)
)


@given(TABLES)
def test_it_reads_back_equal(table: dict[str, Any]) -> None:
    assert tomllib.loads(toml.dumps(table)) == table


@pytest.mark.parametrize("name", names())
def test_a_profile_written_whole_is_the_same(name: str, tmp_path: Path) -> None:
    profile = load_profile(name, {"lora.ranks": {"head": 3}, "data.files": ['a "b"\\c\n']})
    path = tmp_path / f"{name}.toml"
    path.write_text(toml.dumps(profile.model_dump(mode="json", exclude={"name"})), encoding="utf-8")
    assert load_profile(path) == profile
