"""The tokenize stage: books that balance, rejects with their reason, masks, borders and the same bytes every time."""

import hashlib
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magellano.data.accounting import Accounting
from magellano.data.shards import Shards
from magellano.errors import InputError
from magellano.profile import DataConfig
from magellano.progress import silent
from magellano.stages import tokenize
from magellano.tokenizer import Tokenizer

VOCAB = 300


def lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def run(tmp_path: Path, config: DataConfig, name: str = "out") -> tuple[Path, dict[str, Any]]:
    out = tmp_path / name
    out.mkdir()
    return out, tokenize.run(out, config, VOCAB, silent)


def documents(out: Path, split: str) -> list[tuple[str, str]]:
    """(text, counted text) of every piece, read back from the packed rows; `$` stands for end-of-text."""
    tokenizer, found = Tokenizer(VOCAB), []
    shards = Shards(out, split)
    batch = shards.batch(range(shards.rows))

    def show(ids: np.ndarray) -> str:
        return "".join("$" if i == tokenizer.end_of_text else tokenizer.decode([i]) for i in ids.tolist())

    for targets, weights, reset in zip(batch.targets, batch.weights, batch.reset, strict=True):
        starts = [*np.flatnonzero(reset), shards.seq_len]
        for a, b in pairwise(starts):
            if weights[a:b].any():
                found.append((show(targets[a:b]), show(targets[a:b][weights[a:b] > 0])))
    return found


def test_books_balance_and_rejects_say_where_and_why(tmp_path: Path) -> None:
    good = [{"text": f"document number {i}"} for i in range(40)]
    a = lines(tmp_path / "a.jsonl", [*good, {"text": None}, {"text": " "}, {"text": "document number 3", "id": 1}])
    b = lines(tmp_path / "b.jsonl", [{"text": 7}, {"text": "a different one"}])
    out, summary = run(tmp_path, DataConfig(files=(str(a), str(b)), seq_len=32, held_out=0.2))
    books = summary["accounting"]
    assert books["rows_read"] == 45
    assert books["used"] == 41 == sum(books["documents"].values())
    assert books["duplicates"] == 1
    assert books["rejected"] == {"text is empty or blank": 1, "text is missing or null": 1, "text is not text": 1}
    assert [json.loads(line) for line in (out / tokenize.REJECTS).read_text().splitlines()] == [
        {"file": str(a), "row": 41, "column": "text", "reason": "is missing or null"},
        {"file": str(a), "row": 42, "column": "text", "reason": "is empty or blank"},
        {"file": str(b), "row": 1, "column": "text", "reason": "is not text"},
    ]
    assert books["tokens_in"] == books["trained"] + books["held_out"]
    assert books["context"] == books["dropped"] == 0
    facts = json.loads((out / "tokens.json").read_text())
    assert facts["accounting"] == books
    assert facts["files"] == {str(a): 43, str(b): 2}

    wanted = {f"{row['text']}$" for row in good} | {"a different one$"}
    train, held_out = ({text for text, _ in documents(out, split)} for split in ("train", "held_out"))
    assert train | held_out == wanted
    assert not train & held_out
    held_texts = [text.removesuffix("$") for text in held_out]
    assert books["held_out_bytes"] == sum(len(text.encode()) for text in held_texts)


def test_books_agree_with_the_shards(tmp_path: Path) -> None:
    rows = [{"prompt": f"question {i}: ", "completion": f"answer {i}"} for i in range(60)]
    path = lines(tmp_path / "a.jsonl", rows)
    out, summary = run(tmp_path, DataConfig(format="completions", files=(str(path),), seq_len=48, held_out=0.2))
    books = summary["accounting"]
    train, held_out = (Shards(out, split) for split in ("train", "held_out"))
    whole, held = train.batch(range(train.rows)), held_out.batch(range(held_out.rows))
    assert books["trained"] == whole.weights.sum()
    assert books["held_out_counted"] == held.weights.sum()
    positions = whole.tokens.size + held.tokens.size
    assert positions == books["trained"] + books["context"] + books["held_out"] + books["padding"]
    assert {counted for _, counted in documents(out, "train") + documents(out, "held_out")} == {
        f"answer {i}$" for i in range(60)
    }


def test_chat_counts_what_the_assistant_says(tmp_path: Path) -> None:
    def chat(i: int) -> dict[str, Any]:
        return {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"hi {i}"},
                {"role": "assistant", "content": f"hello {i}"},
                {"role": "user", "content": "bye"},
                {"role": "assistant", "content": "goodbye"},
            ]
        }

    path = lines(tmp_path / "a.jsonl", [chat(i) for i in range(10)])
    out, _ = run(tmp_path, DataConfig(format="chat", files=(str(path),), seq_len=128))
    found = documents(out, "train") + documents(out, "held_out")
    assert {counted for _, counted in found} == {f"hello {i}$goodbye$" for i in range(10)}
    assert found[0][0].startswith("### System:\nBe brief.\n\n### User:\nhi ")


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_alpaca_and_sharegpt_files_keep_balanced_books(tmp_path: Path, suffix: str) -> None:
    import pandas as pd

    ask = [{"instruction": f"Add {i}", "input": None if i % 2 else "1", "output": str(i + 1)} for i in range(20)]
    talk = [
        {"conversations": [{"from": "human", "value": f"hi {i}"}, {"from": "gpt", "value": "ho"}]} for i in range(9)
    ]
    for format, rows, bad in (
        ("alpaca", ask, {"instruction": "x", "input": None, "output": ""}), ("sharegpt", talk, {"conversations": []})
    ):  # fmt: skip
        path = tmp_path / f"{format}.{suffix}"
        frame = pd.DataFrame([*rows, bad, rows[0]])
        frame.to_parquet(path) if suffix == "parquet" else lines(path, [*rows, bad, rows[0]])
        out, summary = run(tmp_path, DataConfig(format=format, files=(str(path),), seq_len=64, held_out=0.3), format)
        books = summary["accounting"]
        assert (books["rows_read"], books["used"], books["duplicates"]) == (len(rows) + 2, len(rows), 1)
        assert sum(books["rejected"].values()) == 1
        counted = {counted for split in ("train", "held_out") for _, counted in documents(out, split)}
        assert counted == ({f"{i + 1}$" for i in range(20)} if format == "alpaca" else {"ho$"})


def test_columns_of_another_format_are_named(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [{"instruction": "x", "output": "y"}])
    with pytest.raises(InputError, match=r"no column text .*; data\.format = 'alpaca' reads them"):
        run(tmp_path, DataConfig(files=(str(path),)))


def test_long_documents_are_cut_without_loss_and_pieces_that_teach_nothing_are_counted_as_dropped(
    tmp_path: Path,
) -> None:
    rows = [{"prompt": f"{i} " + "p" * 200, "completion": "yes" + "!" * i} for i in range(5)]
    path = lines(tmp_path / "a.jsonl", rows)
    out, summary = run(tmp_path, DataConfig(format="completions", files=(str(path),), seq_len=16))
    books = summary["accounting"]
    assert books["split"] == 5
    assert books["dropped"] > 0
    counted = "".join(counted for split in ("train", "held_out") for _, counted in documents(out, split))
    assert sorted(counted) == sorted("".join(row["completion"] + "$" for row in rows))


@pytest.mark.parametrize("deduplicate", [True, False])
def test_copies_are_kept_only_on_request_and_on_one_side(tmp_path: Path, deduplicate: bool) -> None:
    path = lines(tmp_path / "a.jsonl", [{"text": f"text {i % 10}"} for i in range(30)])
    config = DataConfig(files=(str(path),), seq_len=16, held_out=0.3, deduplicate=deduplicate)
    out, summary = run(tmp_path, config)
    assert summary["accounting"]["duplicates"] == (20 if deduplicate else 0)
    train, held_out = ({text for text, _ in documents(out, split)} for split in ("train", "held_out"))
    assert len(train) + len(held_out) == 10


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    config = DataConfig(files=("builtin:python-topics",), seq_len=256)
    first, second = (run(tmp_path, config, name)[0] for name in ("one", "two"))
    names = sorted(p.name for p in first.iterdir())
    assert names == ["held_out-00000.safetensors", "rejects.jsonl", "tokens.json", "train-00000.safetensors"]
    for name in names:
        assert (
            hashlib.sha256((first / name).read_bytes()).digest()
            == hashlib.sha256((second / name).read_bytes()).digest()
        )


def test_many_shards_hold_what_one_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = DataConfig(files=("builtin:python-topics",), seq_len=64)
    one, _ = run(tmp_path, config, "one")
    monkeypatch.setattr(tokenize, "SHARD_TOKENS", 64 * 100)
    many, _ = run(tmp_path, config, "many")
    assert len(list(many.glob("train-*"))) > 10
    a, b = Shards(one, "train"), Shards(many, "train")
    assert a.rows == b.rows
    assert np.array_equal(a.batch(range(a.rows)).tokens, b.batch(range(b.rows)).tokens)


def test_progress_reaches_its_end(tmp_path: Path) -> None:
    paths = [lines(tmp_path / f"{i}.jsonl", [{"text": f"{i} {j}"} for j in range(1200)]) for i in range(2)]
    seen: list[tuple[int, int, float | str]] = []
    out = tmp_path / "out"
    out.mkdir()
    config = DataConfig(files=tuple(map(str, paths)))
    tokenize.run(out, config, VOCAB, lambda done, total, **facts: seen.append((done, total, facts["rows"])))
    assert seen == [(0, 2, 1000), (1, 2, 1200), (1, 2, 2200), (2, 2, 2400)]


def test_no_valid_row_and_one_document_are_refused(tmp_path: Path) -> None:
    bad = lines(tmp_path / "bad.jsonl", [{"text": 1}, {"text": ""}])
    with pytest.raises(InputError, match=r"all 2 rows are rejected, the first: .*bad\.jsonl: row 1: text is not text"):
        run(tmp_path, DataConfig(files=(str(bad),)), "one")
    single = lines(tmp_path / "single.jsonl", [{"text": "alone"}])
    with pytest.raises(InputError, match="only one different document"):
        run(tmp_path, DataConfig(files=(str(single),)), "two")


@pytest.mark.parametrize("lost", ["used", "trained", "duplicates"])
def test_unbalanced_books_are_noticed(lost: str) -> None:
    books = Accounting(rows_read=3, used=2, duplicates=1, tokens_in=9, trained=5, context=2, held_out=2)
    books.documents.update(train=1, held_out=1)
    books.check()
    setattr(books, lost, getattr(books, lost) - 1)
    with pytest.raises(AssertionError):
        books.check()
