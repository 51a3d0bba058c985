"""Malformed, oversized and dishonest data files: exact books or one clear line, in 5 s of CPU and 1 GB of memory."""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magellano.errors import InputError
from magellano.profile import DataConfig
from magellano.progress import silent
from magellano.stages import tokenize
from tests.data.hostile_cases import CASES, GOOD, lines

SECONDS, BYTES = 5.0, 1_000_000_000
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, dict[str, Any]]:
    """What became of each case that is asked for, by one child process that forks for each."""
    wanted = {item.callspec.params["name"] for item in request.session.items if "outcomes" in item.fixturenames}
    folder, asked = tmp_path_factory.mktemp("hostile"), []
    for format, rows in GOOD.items():
        (folder / f"{format}.jsonl").write_text(lines(*rows))
    for name in wanted:
        case, path = CASES[name], folder / name / CASES[name].file
        case.write(path)
        asked.append((name, {"format": case.format, "files": [str(folder / f"{case.format}.jsonl"), str(path)]}))
    command = [sys.executable, str(Path(__file__).with_name("hostile_runner.py"))]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, env=environment, check=True)
    assert "Traceback" not in done.stderr
    return {answer["name"]: answer for answer in map(json.loads, done.stdout.splitlines())}


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_hostile_file_gets_exact_books_or_one_line(name: str, outcomes: dict[str, dict[str, Any]]) -> None:
    case, outcome = CASES[name], outcomes[name]
    assert "crashed" not in outcome, outcome["crashed"]
    assert outcome["seconds"] < SECONDS
    assert outcome["bytes"] < BYTES
    if case.refused:
        message = outcome.get("refused", f"accepted: {outcome}")
        assert re.search(case.refused, message), message
        assert f"{name}/{case.file}" in message
        assert len(message.splitlines()) == 1
        assert re.search(r"; \w+", message), f"no remedy: {message}"
        return
    books = outcome["books"]
    assert books["rejected"] == case.rejected
    assert (books["used"], books["duplicates"]) == (3 + case.used, case.duplicates)
    assert books["rows_read"] == books["used"] + books["duplicates"] + sum(books["rejected"].values())
    assert len(outcome["rejects"]) == sum(case.rejected.values())
    for reject in outcome["rejects"]:
        assert reject["file"].endswith(f"{name}/{case.file}")
        assert reject["row"] >= 1
        assert f"{reject['column']} {reject['reason']}" in case.rejected


def test_there_are_enough_cases() -> None:
    assert len(CASES) >= 60


def balanced(suffix: str, content: bytes, format: str = "text") -> dict[str, Any]:
    """The books of a file read after good rows; {} where it is refused with one line that names it."""
    with tempfile.TemporaryDirectory() as name:
        good, bad, out = Path(name, "good.jsonl"), Path(name, f"bad{suffix}"), Path(name, "out")
        good.write_text(lines(*GOOD[format]))
        bad.write_bytes(content)
        out.mkdir()
        try:
            books = tokenize.run(out, DataConfig(format=format, files=(str(good), str(bad))), 300, silent)["accounting"]
            message = str(bad)
        except InputError as e:
            books, message = {}, str(e)
    assert str(bad) in message
    assert len(message.splitlines()) == 1
    if not books:
        return {}
    assert books["rows_read"] == books["used"] + books["duplicates"] + sum(books["rejected"].values())
    return books


@settings(max_examples=150, deadline=None)
@given(
    st.sampled_from([".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet"]),
    st.one_of(st.binary(max_size=200), st.text(alphabet='[]{}",:\\\n\r\t\0 tex1\ufeff', max_size=200).map(str.encode)),
)
def test_random_bytes_balance_or_are_refused(suffix: str, content: bytes) -> None:
    balanced(suffix, content)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(alphabet=st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "x"]), inner),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(list(GOOD)), st.lists(VALUES, min_size=1, max_size=12))
def test_random_records_balance_to_the_row(format: str, values: list[Any]) -> None:
    columns = list(GOOD[format][0])
    rows = [dict.fromkeys(columns, value) for value in values]
    books = balanced(".jsonl", lines(*rows).encode(), format)
    assert books["rows_read"] == 3 + len(rows)
