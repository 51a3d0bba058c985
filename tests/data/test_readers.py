"""Readers: every kind of file gives the same rows with their numbers, and each mistake gets one clear line."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from magellano.data import readers
from magellano.errors import InputError
from magellano.profile import DataConfig

TEXTS = ["one", "two\nlines", "2020-01-02", "NA", "7", "naïve “quotes”"]


def config(*files: Path | str, **more: Any) -> DataConfig:
    return DataConfig(files=tuple(str(f) for f in files), **more)


def rows(*files: Path | str, **more: Any) -> list[tuple[str, int, dict[str, Any]]]:
    chunks = readers.read(config(*files, **more))
    return [(Path(c.file).name, n, row) for c in chunks for n, row in zip(c.numbers, c.rows, strict=True)]


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def write_kind(folder: Path, suffix: str) -> Path:
    """TEXTS as a file of one kind."""
    path, table = folder / f"data{suffix}", [{"text": text, "id": i} for i, text in enumerate(TEXTS)]
    match suffix:
        case ".jsonl" | ".ndjson":
            write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in table))
        case ".json":
            write(path, json.dumps(table, indent=1))
        case ".parquet":
            pd.DataFrame(table).to_parquet(path)
        case ".csv" | ".tsv":
            pd.DataFrame(table).to_csv(path, index=False, sep="\t" if suffix == ".tsv" else ",")
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv"])
def test_every_kind_of_table_gives_the_texts_unchanged(tmp_path: Path, suffix: str) -> None:
    found = rows(write_kind(tmp_path, suffix))
    assert [(name, number, row["text"]) for name, number, row in found] == [
        (f"data{suffix}", i, text) for i, text in enumerate(TEXTS, 1)
    ]


def test_a_text_file_is_one_document(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "first\n\nsecond é\n")
    assert rows(path) == [("a.txt", 1, {"text": "first\n\nsecond é\n"})]


def test_row_numbers_are_line_numbers_in_json_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '\ufeff{"text": "a"}\r\n\n{"text": "b"}')
    assert rows(path) == [("a.jsonl", 1, {"text": "a"}), ("a.jsonl", 3, {"text": "b"})]


def test_json_that_is_no_array_is_read_as_lines(tmp_path: Path) -> None:
    assert len(rows(write(tmp_path / "a.json", '{"text": "a"}\n{"text": "b"}\n'))) == 2


def test_large_files_come_in_chunks(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "x"}\n' * 2500)
    chunks = list(readers.read(config(path)))
    assert [len(c.rows) for c in chunks] == [1000, 1000, 500]
    assert [c.last for c in chunks] == [False, False, True]
    assert [n for c in chunks for n in c.numbers] == list(range(1, 2501))


def test_folders_and_globs_are_sorted_recursive_and_read_each_file_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("b.txt", "a/z.txt", "a/y.txt", ".hidden/x.txt", ".x.txt", "notes.md"):
        write(tmp_path / name, name)
    inside = ["a/y.txt", "a/z.txt", "b.txt"]
    assert [row["text"] for _, _, row in rows(tmp_path)] == inside
    assert "left out 1 files of other suffixes: notes.md" in caplog.text
    assert [row["text"] for _, _, row in rows(f"{tmp_path}/**/*.txt")] == inside
    assert [row["text"] for _, _, row in rows(tmp_path / "b.txt", tmp_path)] == ["b.txt", "a/y.txt", "a/z.txt"]


def test_names_that_look_like_patterns_are_names(tmp_path: Path) -> None:
    assert len(rows(write(tmp_path / "da[t]a *.jsonl", '{"text": "a"}\n'))) == 1


def test_max_rows_stops_across_files(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{i}.jsonl", '{"text": "x"}\n' * 3) for i in range(3)]
    assert [(name, n) for name, n, _ in rows(*files, max_rows=4)] == [
        ("0.jsonl", 1),
        ("0.jsonl", 2),
        ("0.jsonl", 3),
        ("1.jsonl", 1),
    ]


BAD: list[tuple[str, str | bytes, str]] = [
    ("a.xml", "x", r"a\.xml: unknown suffix '\.xml'; known are \.jsonl"),
    ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl: row 2: malformed JSON at column 10"),
    ("a.jsonl", '{"text": "a"}\n[1]\n', r"a\.jsonl: row 2: a JSON list, not an object"),
    ("a.jsonl", "[" * 200_000, r"a\.jsonl: row 1: JSON nested too deeply"),
    ("a.json", '[{"text": "a"},\n{]', r"a\.json: malformed JSON at line 2, column 2"),
    (
        "a.jsonl",
        b'{"text": "a"}\n{"text": "\xff"}\n',
        r"a\.jsonl: line 2: invalid UTF-8 at byte 24 of the file \(0xff\)",
    ),
    ("a.txt", b"ok\nab\xe9c", r"a\.txt: line 2: invalid UTF-8 at byte 5 of the file \(0xe9\)"),
    ("a.csv", b"text\nok\n\xff\n", r"a\.csv: line 3: invalid UTF-8 at byte 8"),
    ("a.csv", "text,b\n1,2\n1,2,3\n", r"a\.csv: not a readable CSV file \(.*line 3, saw 3"),
    ("a.parquet", "nonsense", r"a\.parquet: not a readable parquet file"),
    ("a.parquet", "", r"a\.parquet: not a readable parquet file"),
    ("a.jsonl", '{"body": "a", "id": 1}\n', r"a\.jsonl: no column text \(format 'text' wants text; found body, id\)"),
    ("a.csv", "body\na\n", r"a\.csv: no column text"),
    ("a.jsonl", "", "the data set is empty"),
    ("a.jsonl", "\n\n", "the data set is empty"),
    ("a.json", "[]", "the data set is empty"),
    ("a.csv", "text\n", "the data set is empty"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD)
def test_bad_files_get_one_line(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as error:
        rows(path)
    assert "\n" not in str(error.value)


def test_bad_places_get_one_line(tmp_path: Path) -> None:
    write(tmp_path / "empty" / "notes.md", "x")
    os.mkfifo(tmp_path / "pipe.jsonl")
    for place, message in (
        (tmp_path / "nothing.jsonl", "no such file or folder"),
        (tmp_path / "*.csv", "matches no file"),
        (tmp_path / "empty", "no file with a known suffix"),
        (tmp_path / "pipe.jsonl", "neither a file nor a folder"),
        ("builtin:cobol", "no such built-in data set; there are builtin:python-topics"),
    ):
        with pytest.raises(InputError, match=message):
            rows(place)


def test_wrong_columns_name_what_the_format_wants(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"prompt": "a"}\n')
    with pytest.raises(InputError, match=r"no column completion \(format 'completions' wants prompt, completion"):
        rows(path, format="completions")


def test_digest_follows_names_and_contents_and_not_the_place(tmp_path: Path) -> None:
    for copy in ("one", "two"):
        write(tmp_path / copy / "a.txt", "a")
        write(tmp_path / copy / "b.txt", "b")
    digest = readers.digest(config(tmp_path / "one"))
    assert digest == readers.digest(config(tmp_path / "two"))
    assert digest == readers.digest(config(f"{tmp_path}/one/*.txt"))
    write(tmp_path / "two" / "b.txt", "c")
    assert digest != readers.digest(config(tmp_path / "two"))
    (tmp_path / "one" / "b.txt").rename(tmp_path / "one" / "c.txt")
    assert digest != readers.digest(config(tmp_path / "one"))


NO_NETWORK = """
import socket, sys
from pathlib import Path
asked = []
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        asked.append((event, str(args[1:])))
sys.addaudithook(watch)
if sys.argv[2] == "control":
    try: socket.getaddrinfo("localhost", 80)
    except OSError: pass
from magellano.data import readers
from magellano.profile import DataConfig
files = tuple(sorted(str(p) for p in Path(sys.argv[1]).iterdir()))
print(sum(len(c.rows) for c in readers.read(DataConfig(files=files))), len(asked), file=sys.stdout)
"""


@pytest.mark.parametrize("control", ["none", "control"])
def test_local_files_ask_no_host_and_leave_nothing_in_the_home(tmp_path: Path, control: str) -> None:
    (tmp_path / "data").mkdir()
    for suffix in (".jsonl", ".parquet", ".csv"):
        write_kind(tmp_path / "data", suffix)
    home = tmp_path / "home"
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("HF_")} | {"HOME": str(home)}
    command = [sys.executable, "-c", NO_NETWORK, str(tmp_path / "data"), control]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [str(3 * len(TEXTS)), "1" if control == "control" else "0"]
    assert not [p for p in home.rglob("*") if p.is_file()]


def test_a_hub_name_is_refused_where_the_network_is_forbidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(InputError, match="hub data set 'someone/something': HF_HUB_OFFLINE forbids the network"):
        readers.digest(DataConfig(hub="someone/something"))


class Hub:
    """What `readers` asks of the hub, answered here."""

    def dataset_info(self, name: str) -> Any:
        if name != "someone/something":
            raise ConnectionError("no route to the hub")
        return type("Info", (), {"sha": "abc123"})()


def test_hub_rows_are_read_at_a_fixed_revision_and_said_aloud(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import datasets
    import huggingface_hub

    asked: dict[str, Any] = {}

    def load_dataset(name: str, **options: Any) -> list[dict[str, str]]:
        asked.update(options, name=name)
        return [{"text": "a"}, {"text": "b"}]

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    chunks = list(readers.read(DataConfig(hub="someone/something", split="validation")))
    assert [(c.file, c.numbers) for c in chunks] == [("hub:someone/something/validation", [1, 2])]
    assert asked == {"name": "someone/something", "split": "validation", "revision": "abc123", "streaming": True}
    assert "this uses the network" in caplog.text
    with pytest.raises(InputError, match=r"hub data set 'no/thing': cannot be read \(no route to the hub\)"):
        readers.digest(DataConfig(hub="no/thing"))
