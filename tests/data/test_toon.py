"""TOON: what becomes of JSON in prompts, by the specification's own examples and rules; the books; the refusals."""

import json
from pathlib import Path
from typing import Any

import pytest

from magellano.data import formats, limits
from magellano.data.toon import FAILURES, rendered
from magellano.names import DataFormat
from magellano.profile import DataConfig, load_profile
from magellano.progress import silent
from magellano.report import accounting
from magellano.stages import tokenize

toon_format = pytest.importorskip("toon_format", reason="pip install -r requirements.lock")

RECORDS = {"users": [{"id": 1, "name": "Ada"}, {"id": 2, "name": "Linus"}]}
TABLE = "users[2]{id,name}:\n  1,Ada\n  2,Linus"


@pytest.mark.parametrize(
    ("value", "wanted"),
    [  # sections of the specification: tables 9.3, inline arrays 9.1, objects 8, quoting 7.2, numbers 2, list items 9.4
        (RECORDS, TABLE),
        ({"tags": ["a", "b", "c"]}, "tags[3]: a,b,c"),
        ({"a": {"b": 1}, "c": None}, "a:\n  b: 1\nc: null"),
        ({"s": "true", "t": "05", "u": "a,b", "v": "", "w": "x: y"}, 's: "true"\nt: "05"\nu: "a,b"\nv: ""\nw: "x: y"'),
        ({"n": 1e6, "m": 1.5, "z": -0.0}, "n: 1000000\nm: 1.5\nz: 0"),
        ([{"id": 1}, {"id": 2}], "[2]{id}:\n  1\n  2"),
    ],
)
def test_conformance(value: Any, wanted: str) -> None:
    text, (record,) = rendered(json.dumps(value))
    assert text == record.toon == wanted
    assert toon_format.loads(text) == value


def test_records_are_found_where_they_begin_and_end_a_line() -> None:
    spelled = json.dumps(RECORDS)
    assert rendered(f"Who?\n{spelled}\nAnswer: ")[0] == f"Who?\n{TABLE}\nAnswer: "
    assert rendered(f"Data: {spelled}\nWho?")[0] == f"Data:\n{TABLE}\nWho?"
    assert rendered(f"```json\n{json.dumps(RECORDS, indent=2)}\n```\n")[0] == f"```toon\n{TABLE}\n```\n"
    text, records = rendered(f"{spelled}\n\n{spelled}")
    assert text == f"{TABLE}\n\n{TABLE}"
    assert len(records) == 2


@pytest.mark.parametrize(
    "text",
    [
        "", "plain", "[1]", "[1, 2]", "{}", "[]", "{a: 1}", '{"a": 1} and more', 'say {"a": 1}', '{"a": 1, "a": 2}',
        '{"a": NaN}', "[[[[", '{"a": "', "x[0] = {1}\n", "[" * 100_000, "[\n" * 100_000, ": [\n" * 50_000,
    ],
)  # fmt: skip
def test_what_is_no_record_stays(text: str) -> None:
    assert rendered(text) == (text, [])


def test_what_would_not_come_back_stays_and_is_counted() -> None:
    text, records = rendered('{"a": 1e400}')
    assert text == '{"a": 1e400}'
    assert [record.toon for record in records] == [""]


def test_too_many_values_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "TOON_VALUES", 3)
    text, records = rendered('{"a": 1}\n{"b": 1}\n{"c": [1, 2]}')
    assert text == 'a: 1\n{"b": 1}\n{"c": [1, 2]}'
    assert [bool(record.toon) for record in records] == [True, False, False]


def test_beginnings_without_end_are_given_up_after_a_few() -> None:
    text = "[x\n" * FAILURES + json.dumps(RECORDS)
    assert rendered(text) == (text, [])
    assert rendered(text[3:])[0].endswith(TABLE)


def test_answers_stay_as_they_are() -> None:
    spelled = json.dumps(RECORDS)
    row = {"messages": [{"role": "user", "content": spelled}, {"role": "assistant", "content": spelled}]}
    parts = formats.segments(row, DataFormat.CHAT, None, lambda text: rendered(text)[0])
    assert [part.text for part in parts if part.counts] == [spelled]
    assert TABLE in [part.text for part in parts if not part.counts]


def test_the_books_and_the_report_tell_what_was_saved(tmp_path: Path) -> None:
    rows = [{"prompt": json.dumps({"of": i, **RECORDS}) + "\n", "completion": "Ada"} for i in range(20)]
    rows += [rows[0], {"prompt": '{"a": 1e400}', "completion": "x"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = DataConfig(
        format="completions", files=(str(tmp_path / "a.jsonl"),), render="toon", seq_len=128, held_out=0.2
    )
    books = {}
    for config in (data, data.model_copy(update={"render": "json"})):
        (out := tmp_path / str(len(books))).mkdir()
        books[len(books)] = tokenize.run(out, config, 1000, silent)["accounting"]
    toon, plain = books[0], books[1]
    assert (toon["toon_records"], toon["toon_kept"], plain["toon_records"]) == (20, 1, 0)
    saved = toon["json_tokens"] - toon["toon_tokens"]
    assert saved > 0.2 * toon["json_tokens"]
    assert plain["tokens_in"] - toon["tokens_in"] == pytest.approx(saved, abs=40), "a border token or two a row"
    (table,) = accounting({"stages": [{"stage": "tokenize", "summary": {"accounting": toon}}]})
    (line,) = [row for row in table.rows if row[0] == "JSON records as TOON"]
    assert line[1] == "20"
    assert f"{toon['toon_tokens']:,} tokens in place of {toon['json_tokens']:,}: -" in line[2]
    assert "1 stayed JSON" in line[2]


def test_text_has_no_prompts() -> None:
    with pytest.raises(ValueError, match='render "toon" is for prompts'):
        load_profile("demo", {"data.format": "text", "data.render": "toon"})
