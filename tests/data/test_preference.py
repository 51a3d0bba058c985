"""Preference pairs from files to packed rows: what counts, what is rejected, that pairs are whole in every row."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magellano import dpo
from magellano.data import formats, schema
from magellano.data.shards import Shards
from magellano.errors import InputError
from magellano.names import DataFormat
from magellano.profile import DataConfig
from magellano.progress import silent
from magellano.stages import tokenize
from magellano.tokenizer import Tokenizer

TOKENIZER = Tokenizer(300)
USER, GOOD, BAD = ({"role": r, "content": c} for r, c in (("user", "hi"), ("assistant", "good"), ("assistant", "bad")))
TEXT = {"prompt": "p", "chosen": "c", "rejected": "r"}


def run(tmp_path: Path, rows: list[Any], **more: Any) -> tuple[Path, dict[str, Any]]:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    out = tmp_path / "out"
    out.mkdir()
    data = DataConfig(format="preference", files=(str(tmp_path / "a.jsonl"),), held_out=0.3, **more)
    return out, tokenize.run(out, data, 300, silent)["accounting"]


def documents(out: Path, split: str) -> list[list[tuple[str, str]]]:
    """(text, counted text) of every document, row by row; `$` stands for end-of-text."""
    rows = Shards(out, split)
    batch, found = rows.batch(range(rows.rows)), []

    def show(ids: np.ndarray) -> str:
        return "".join("$" if i == 299 else TOKENIZER.decode([i]) for i in ids.tolist())

    for targets, weights, reset in zip(batch.targets, batch.weights, batch.reset, strict=True):
        starts = [*np.flatnonzero(reset), rows.seq_len]
        whole = [(targets[a:b], weights[a:b]) for a, b in pairwise(starts) if weights[a:b].any()]
        found.append([(show(t), show(t[w > 0])) for t, w in whole])
    return found


def test_pairs_stay_together_and_their_answers_count(tmp_path: Path) -> None:
    rows = [{"prompt": f"say {n}: ", "chosen": "yes" * (1 + n % 5), "rejected": "no" * (1 + n % 3)} for n in range(40)]
    out, books = run(tmp_path, [*rows, rows[0]], seq_len=64)
    assert (books["rows_read"], books["used"], books["duplicates"]) == (41, 40, 1)
    assert books["documents"]["train"] + books["documents"]["held_out"] == 40
    found = documents(out, "train") + documents(out, "held_out")
    assert max(map(len, found)) > 2, "several pairs in a row"
    seen = []
    for row in found:
        for chosen, rejected in zip(row[::2], row[1::2], strict=True):
            n = int(chosen[0].split(":")[0].removeprefix("say "))
            assert chosen == (f"say {n}: {rows[n]['chosen']}$", f"{rows[n]['chosen']}$")
            assert rejected == (f"say {n}: {rows[n]['rejected']}$", f"{rows[n]['rejected']}$")
            seen.append(n)
    assert sorted(seen) == list(range(40))
    batch = Shards(out, "train").batch([0, 1])
    assert (batch.tokens[batch.reset > 0] == 299).all()
    assert dpo.count(batch) == sum(len(row) for row in documents(out, "train")[:2]) / 2


def test_messages_by_our_template_and_by_another(tmp_path: Path) -> None:
    row = {"prompt": [USER, GOOD | {"content": "so?"}, USER], "chosen": [GOOD], "rejected": [BAD, USER, BAD]}
    assert schema.validate([row], DataFormat.PREFERENCE) == []
    parts = formats.segments(row, DataFormat.PREFERENCE)
    counted = [(part.text, part.ends) for part in parts if part.counts]
    assert counted == [("good", True), ("bad", True), ("bad", True)], "an earlier answer is context"
    assert [n for n, part in enumerate(parts) if part.opens] == [8]
    source = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}"
    )
    path = tmp_path / "t.jinja"
    path.write_text(source + "<assistant>{% endif %}")
    rows = [row | {"chosen": [GOOD | {"content": f"good {n}"}]} for n in range(8)]
    out, books = run(tmp_path, rows, seq_len=256, template=str(path))
    assert books["used"] == 8
    found = sorted(counted for row in documents(out, "train") for _, counted in row)
    assert found[0] == "bad$bad$"
    assert found[-1].startswith("good ")
    assert documents(out, "train")[0][0][0].startswith("<user>hi$<assistant>so?$<user>hi$<assistant>good")


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (TEXT | {"chosen": "r"}, "prompt has the same answer as chosen and rejected"),
        (TEXT | {"rejected": "r" * 60}, "prompt with both answers is longer than data.seq_len tokens"),
        (TEXT | {"chosen": None}, "chosen is missing or null"),
        (TEXT | {"rejected": " "}, "rejected is empty or blank"),
        (TEXT | {"prompt": 7}, "prompt is not text"),
        (TEXT | {"chosen": [GOOD]}, "prompt is text where chosen or rejected are messages, or the other way round"),
        (
            {"prompt": [USER], "chosen": [USER], "rejected": [BAD]},
            "chosen has no assistant message, so nothing would be learnt",
        ),
        (
            {"prompt": [USER | {"role": "x"}], "chosen": [GOOD], "rejected": [BAD]},
            "prompt has a role other than system, user, assistant, tool",
        ),
    ],
)
def test_rows_that_are_no_pairs_are_rejected(row: dict[str, Any], told: str, tmp_path: Path) -> None:
    out, books = run(tmp_path, [TEXT | {"prompt": f"p{n}"} for n in range(6)] + [row], seq_len=48)
    assert books["rejected"] == {told: 1}
    assert books["used"] == 6
    reject = json.loads((out / tokenize.REJECTS).read_text())
    assert (reject["row"], f"{reject['column']} {reject['reason']}") == (7, told)


def test_columns_that_are_missing_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no column rejected"):
        run(tmp_path, [{"prompt": "p", "chosen": "c"}], seq_len=48)
