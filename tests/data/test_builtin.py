"""The built-in sets: real, clean, the same on every run, and made without importing or running the library."""

import subprocess
import sys
from pathlib import Path

import pytest

from magellano.data import builtin
from magellano.errors import InputError


def test_topics_are_prose_without_markup_or_repeats() -> None:
    texts = [row["text"] for row in builtin.topics()]
    assert len(texts) > 100
    assert sum(map(len, texts)) > 250_000
    assert len(set(texts)) == len(texts)
    assert not [t for t in texts if "\n***" in t or "\n===" in t or "\n\n\n" in t]
    assert [t for t in texts if t.startswith('The "with" statement\n\nThe "with" statement is used to wrap')]


def test_docstrings_are_many_different_and_plausible() -> None:
    pairs = builtin.docstrings()
    assert len(pairs) >= 2_000
    assert len({(p["prompt"], p["completion"]) for p in pairs}) == len(pairs)
    assert {
        "prompt": 'def Fraction.limit_denominator(self, max_denominator=1000000):\n    """',
        "completion": "Closest Fraction to self with denominator at most max_denominator.",
    } in pairs
    for pair in pairs:
        assert pair["prompt"].startswith(("def ", "async def "))
        assert pair["prompt"].endswith('):\n    """')
        assert len(pair["completion"].split()) >= 3
        assert "\n" not in pair["completion"]
        assert " at 0x" not in pair["prompt"] + pair["completion"]


DIGEST = """
import hashlib, sys, tempfile
from pathlib import Path
from magellano.data import builtin
before = set(sys.modules)
for name in ("python-topics", "python-docstrings"):
    print(hashlib.sha256(builtin.write(name, Path(tempfile.mkdtemp())).read_bytes()).hexdigest())
print([m for m in ("turtle", "smtplib", "mailbox", "imaplib") if m in set(sys.modules) - before])
"""


def test_two_processes_make_the_same_bytes_and_import_nothing_of_the_library() -> None:
    runs = [
        subprocess.run(
            [sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        )
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout
    assert runs[0].stdout.splitlines()[2] == "[]"


def test_a_python_without_sources_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builtin.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match="only 0 functions found"):
        builtin.docstrings.__wrapped__()
