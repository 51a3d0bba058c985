"""Malformed data files: how each is made, and what the tokenize stage must make of it."""

import gzip
import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

MIB = 1 << 20
GOOD = {
    "text": [{"text": f"good text {i}"} for i in range(3)],
    "completions": [{"prompt": f"question {i} ", "completion": "answer"} for i in range(3)],
    "chat": [
        {"messages": [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "yes"}]}
        for i in range(3)
    ],
}
Content = bytes | str | Callable[[Path], object]


@dataclass(frozen=True)
class Case:
    """A file read after three good rows. Either `refused` matches the message, or the file's rows end as counted."""

    file: str
    content: Content
    refused: str = ""
    used: int = 0
    duplicates: int = 0
    rejected: dict[str, int] = field(default_factory=dict)
    format: str = "text"

    def write(self, path: Path) -> None:
        path.parent.mkdir(parents=True)
        if callable(self.content):
            self.content(path)
        else:
            path.write_bytes(self.content.encode("utf-8") if isinstance(self.content, str) else self.content)


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def text_row(value: Any) -> str:
    return json.dumps({"text": value}) + "\n"


def parquet(columns: dict[str, Any], **options: Any) -> Callable[[Path], object]:
    return lambda path: pq.write_table(pa.table(columns), path, **options)


def many_groups(value: str, groups: int, rows: int, **options: Any) -> Callable[[Path], object]:
    """A Parquet file of `groups` row groups of `rows` rows that all say the same."""

    def write(path: Path) -> None:
        dictionary = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))
        table = pa.table({"text": dictionary})
        with pq.ParquetWriter(path, table.schema, **options) as writer:
            for _ in range(groups):
                writer.write_table(table)

    return write


def spoil(columns: dict[str, Any], change: Callable[[bytearray], object]) -> Callable[[Path], object]:
    """A Parquet file with bytes changed."""

    def write(path: Path) -> None:
        parquet(columns)(path)
        data = bytearray(path.read_bytes())
        change(data)
        path.write_bytes(data)

    return write


def sparse(path: Path) -> None:
    with open(path, "wb") as file:
        file.truncate(1 << 40)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", b" " * 50 * MIB)


def chat(*messages: Any) -> dict[str, Any]:
    return {"messages": list(messages)}


def invalid_utf8() -> pa.Array:
    raw = pa.array([b"fine", b"ab\xffc"], pa.binary())
    return pa.Array.from_buffers(pa.string(), 2, raw.buffers())


USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}
TEXT_NULL, NOT_TEXT, EMPTY = "text is missing or null", "text is not text", "text is empty or blank"
NUL, HALF = "text holds a NUL character", "text holds half a surrogate pair, which is no character"
BLANKS = "text has a run of more than 100000 blank characters, which the tokenizer cannot split"
NOT_MESSAGES = "messages is not a list of messages with role and content"
LONG = "longer than 16 MiB; "
DEEP, MALFORMED = r"JSON nested too deeply \({} levels, at most 100\); flatten", r"row {}: malformed JSON at column {}"
UTF8 = r"line {}: invalid UTF-8 at byte {} of the file \(0x{}\); save the file as UTF-8"
PACKED, UNREADABLE = r"not text; unpack it", "not a readable parquet file"
BOMB = "over 200 times the file's size; write the rows that you mean"

CASES = {
    # text
    "text-empty": Case("a.txt", b"", rejected={EMPTY: 1}),
    "text-blank": Case("a.txt", b" \n\t\n", rejected={EMPTY: 1}),
    "text-bom-only": Case("a.txt", b"\xef\xbb\xbf", rejected={EMPTY: 1}),
    "text-bom": Case("a.txt", "\ufeffa text", used=1),
    "text-nul": Case("a.txt", b"a\0b", rejected={NUL: 1}),
    "text-invalid": Case("a.txt", b"ok\nab\xe9c", UTF8.format(2, 5, "e9")),
    "text-invalid-after-bom": Case("a.txt", b"\xef\xbb\xbfa\xff", UTF8.format(1, 4, "ff")),
    "text-cut-character": Case("a.txt", "aé".encode()[:-1], UTF8.format(1, 1, "c3")),
    "text-overlong": Case("a.txt", b"\xc0\x80", UTF8.format(1, 0, "c0")),
    "text-utf16": Case("a.txt", "text".encode("utf-16"), "UTF-16, not UTF-8; save"),
    "text-100-MB": Case("a.txt", lambda path: path.write_bytes(b"word " * 20_000_000), f"row 1: the text is {LONG}"),
    "text-sparse-1-TB": Case("a.txt", sparse, f"row 1: the text is {LONG}"),
    "text-blanks": Case("a.txt", b" " * 2_000_000 + b"x", rejected={BLANKS: 1}),
    "text-line-feeds": Case("a.txt", b"x" + b"\n" * 1_000_000 + b"x", rejected={BLANKS: 1}),
    "text-random": Case("a.txt", bytes(range(128, 256)), UTF8.format(1, 0, "80")),
    # JSON Lines
    "lines-empty": Case("a.jsonl", b""),
    "lines-blank": Case("a.jsonl", b"\n\r\n  \n"),
    "lines-bom": Case("a.jsonl", "\ufeff" + text_row("a") + "\n" + text_row("b"), used=2),
    "lines-two-boms": Case("a.jsonl", "\ufeff\ufeff" + text_row("a"), MALFORMED.format(1, 1)),
    "lines-bom-inside": Case("a.jsonl", text_row("a") + "\ufeff" + text_row("b"), MALFORMED.format(2, 1)),
    "lines-invalid": Case("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', UTF8.format(2, 24, "ff")),
    "lines-utf16": Case("a.jsonl", text_row("a").encode("utf-16"), "UTF-16, not UTF-8; save"),
    "lines-utf16-no-bom": Case("a.jsonl", text_row("a").encode("utf-16-le"), MALFORMED.format(1, 2)),
    "lines-nul": Case("a.jsonl", b'{"text": "a\\u0000b"}\n', rejected={NUL: 1}),
    "lines-raw-nul": Case("a.jsonl", b'{"text": "a\0b"}\n', MALFORMED.format(1, 12)),
    "lines-zeros": Case("a.jsonl", bytes(1000), MALFORMED.format(1, 1)),
    "lines-surrogate": Case("a.jsonl", b'{"text": "a\\ud800"}\n', rejected={HALF: 1}),
    "lines-null": Case("a.jsonl", lines({"text": None}, {}, {"text": "a"}), used=1, rejected={TEXT_NULL: 2}),
    "lines-nan": Case("a.jsonl", b'{"text": NaN}\n{"text": Infinity}\n', rejected={TEXT_NULL: 1, NOT_TEXT: 1}),
    "lines-types": Case(
        "a.jsonl",
        "".join(map(text_row, [7, 1.5, True, ["a"], {"a": {"b": None}}, "a"])),
        used=1,
        rejected={NOT_TEXT: 5},
    ),
    "lines-empty-rows": Case("a.jsonl", "".join(map(text_row, ["", " \n", "a"])), used=1, rejected={EMPTY: 2}),
    "lines-duplicates": Case("a.jsonl", text_row("a") * 5 + text_row("b") + lines(*GOOD["text"]), used=2, duplicates=7),
    "lines-columns": Case("a.jsonl", '{"body": "a"}\n', r"no column text \(.*found body\); rename the columns"),
    "lines-array": Case("a.jsonl", b"[1]\n", "row 1: a JSON list, not an object; correct or remove"),
    "lines-scalar": Case("a.jsonl", b'{"text": "a"}\n"b"\n', "row 2: a JSON str, not an object; correct or remove"),
    "lines-cut": Case("a.jsonl", b'{"text": "a"}\n{"text": "b', MALFORMED.format(2, 10)),
    "lines-two-in-one": Case("a.jsonl", b'{"text": "a"}{"text": "b"}\n', MALFORMED.format(1, 14)),
    "lines-carriage-returns": Case("a.jsonl", b'{"text": "a"}\r{"text": "b"}\r', MALFORMED.format(1, 1)),
    "lines-single-quotes": Case("a.jsonl", b"{'text': 'a'}\n", MALFORMED.format(1, 2)),
    "lines-long-number": Case(
        "a.jsonl", b'{"text": "a", "n": ' + b"1" * 10_000 + b"}\n", "row 1: malformed JSON .*digits"
    ),
    "lines-float-overflow": Case("a.jsonl", b'{"text": 1e999}\n', rejected={NOT_TEXT: 1}),
    "lines-deep-200000": Case("a.jsonl", b"[" * 200_000, "row 1: " + DEEP.format(200000)),
    "lines-deep-closed": Case(
        "a.jsonl", b'{"text": ' + b"[" * 200_000 + b"]" * 200_000 + b"}", "row 1: " + DEEP.format(200001)
    ),
    "lines-deep-objects": Case("a.jsonl", b'{"text":' * 200_000, "row 1: " + DEEP.format(200000)),
    "lines-deep-101": Case("a.jsonl", b'{"x": ' + b"[" * 100 + b"]" * 100 + b"}", "row 1: " + DEEP.format(101)),
    "lines-deep-100": Case("a.jsonl", b'{"text": ' + b"[" * 99 + b"]" * 99 + b"}", rejected={NOT_TEXT: 1}),
    "lines-brackets-in-text": Case("a.jsonl", text_row("[{" * 100_000 + '"'), used=1),
    "lines-100-MB": Case(
        "a.jsonl", lambda p: p.write_bytes(b'{"text": "' + b"a" * 100 * MIB + b'"}'), f"row 1: .*{LONG}"
    ),
    "lines-100-MB-blank": Case("a.jsonl", lambda p: p.write_bytes(b" " * 100 * MIB), f"row 1: .*{LONG}"),
    "lines-sparse-1-TB": Case("a.jsonl", sparse, f"row 1: .*{LONG}"),
    "lines-many-objects": Case(
        "a.jsonl",
        lambda p: p.write_bytes(b'{"text": "a", "x": [' + b"{}," * 5_000_000 + b"{}]}"),
        "JSON values, at most",
    ),
    "lines-many-numbers": Case(
        "a.jsonl", lambda p: p.write_bytes(b'{"text": "a", "x": [' + b"0," * 8_000_000 + b"0]}"), "row 1: .*cut it into"
    ),
    "lines-quotes": Case("a.jsonl", b'{"text": "' + b'\\"' * 7_000_000 + b"[" * 200, MALFORMED.format(1, 10)),
    "lines-unclosed-quotes": Case("a.jsonl", b'"' + b"[" * 15_000_000, "row 1: .*(deeply|malformed)"),
    # JSON
    "json-empty": Case("a.json", b""),
    "json-empty-array": Case("a.json", b"[]"),
    "json-cut": Case("a.json", b'[{"text": "a"},\n{', r"malformed JSON at line 2, column 2 \(.*\); correct or remove"),
    "json-scalars": Case("a.json", b'[{"text": "a"}, 5]', "row 2: a JSON int, not an object; correct or remove"),
    "json-invalid": Case("a.json", b'[{"text": "a"},\n{"text": "\xff"}]', UTF8.format(2, 26, "ff")),
    "json-deep": Case("a.json", b"[" * 200_000, DEEP.format(200000)),
    "json-100-MB": Case(
        "a.json", lambda p: p.write_bytes(b"[" + b'{"text": "a"},' * 8_000_000), "write it as JSON Lines"
    ),
    "json-many-values": Case(
        "a.json", lambda p: p.write_bytes(b"[" + b"{}," * 8_000_000 + b"{}]"), "JSON values, at most"
    ),
    "json-long-row": Case("a.json", b'[{"text": "a"}, {"text": "' + b"a" * 20 * MIB + b'"}]', f"row 2 is {LONG}"),
    "json-types": Case(
        "a.json",
        json.dumps([{"text": 1}, {"text": "a"}, {"text": "a"}, {"text": None}]),
        "",
        1,
        1,
        {NOT_TEXT: 1, TEXT_NULL: 1},
    ),
    # CSV
    "csv-empty": Case("a.csv", b""),
    "csv-header": Case("a.csv", b"text\n"),
    "csv-bom": Case("a.csv", "\ufefftext\na\n", used=1),
    "csv-invalid": Case("a.csv", b"text\nok\n\xff\n", UTF8.format(3, 8, "ff")),
    "csv-nul": Case("a.csv", b"text\na\0b\n", rejected={NUL: 1}),
    "csv-columns": Case("a.csv", b"body\na\n", r"no column text \(.*found body\); rename"),
    "csv-twice": Case("a.csv", b"text,text\na,b\n", "two columns are named 'text'; rename one"),
    "csv-too-many": Case("a.csv", b"text,b\n1,2\n1,2,3\n", r"row 2: expected 2 fields in line 3, saw 3\); correct"),
    "csv-too-few": Case("a.csv", b"b,text\n1,2\n1\n", used=1, rejected={TEXT_NULL: 1}),
    "csv-open-quote": Case("a.csv", b'text\n"a\nb\n', r"row 1: unexpected end of data, line 3\); correct .* quotes"),
    "csv-bad-quote": Case("a.csv", b'text\n"a"b\n', r"row 1: .* line 2\); correct that line or its quotes"),
    "csv-open-quote-100-MB": Case(
        "a.csv", lambda p: p.write_bytes(b'text\n"' + b"word\n" * 20_000_000), f"line .*{LONG}"
    ),
    "csv-100-MB": Case("a.csv", lambda p: p.write_bytes(b"text\n" + b"a" * 100 * MIB), f"line 2: the line is {LONG}"),
    "csv-fields": Case("a.csv", b"text" + b",c" * 1_100_000, "line 1 has more than 1000000 fields; correct or remove"),
    "csv-empty-rows": Case("a.csv", b'text,b\n,1\n" ",2\n\na,3\n', used=1, rejected={EMPTY: 2}),
    "csv-carriage-returns": Case("a.csv", b"text\ra\rb\r", r"row 1: a carriage return inside a line"),
    "csv-words-for-null": Case("a.csv", b"text\nNA\nnull\nNaN\nNA\n", used=3, duplicates=1),
    "tsv-too-many": Case("a.tsv", b"text\n1\t2\n", "row 1: expected 1 fields in line 2, saw 2"),
    # packed
    "gzip-bomb": Case("a.jsonl", gzip.compress(bytes(50 * MIB)), f"a gzip file, {PACKED}"),
    "gzip-rows": Case("a.csv", gzip.compress(b"text\na\n"), f"a gzip file, {PACKED}"),
    "gzip-name": Case("a.jsonl.gz", gzip.compress(text_row("a").encode()), "unknown suffix '.gz'; known are .jsonl"),
    "zip-bomb": Case("a.json", zipped, f"a zip archive, {PACKED}"),
    "zstd": Case("a.txt", b"\x28\xb5\x2f\xfd" + bytes(9), f"a zstd file, {PACKED}"),
    "xz": Case("a.txt", b"\xfd7zXZ\x00" + bytes(9), f"an xz file, {PACKED}"),
    "bzip2": Case("a.txt", b"BZh9" + bytes(9), f"a bzip2 file, {PACKED}"),
    # Parquet
    "parquet-empty": Case("a.parquet", b"", UNREADABLE),
    "parquet-nonsense": Case("a.parquet", b"nonsense" * 100, UNREADABLE),
    "parquet-no-rows": Case("a.parquet", parquet({"text": pa.array([], pa.string())})),
    "parquet-gzip": Case("a.parquet", gzip.compress(b"PAR1"), UNREADABLE),
    "parquet-cut": Case("a.parquet", spoil({"text": ["a", "b"]}, lambda d: d.__delitem__(slice(50, None))), UNREADABLE),
    "parquet-footer": Case("a.parquet", b"PAR1" + bytes(99) + b"\xff\xff\xff\x7fPAR1", "a footer of 2147483647 bytes"),
    "parquet-page": Case(
        "a.parquet", spoil({"text": ["a", "b"]}, lambda d: d.__setitem__(slice(4, 30), b"\xff" * 26)), UNREADABLE
    ),
    "parquet-columns": Case("a.parquet", parquet({"body": ["a"]}), r"no column text \(.*found body\); rename"),
    "parquet-null": Case("a.parquet", parquet({"text": ["a", None, "b"]}), used=2, rejected={TEXT_NULL: 1}),
    "parquet-all-null": Case("a.parquet", parquet({"text": pa.nulls(4)}), rejected={TEXT_NULL: 4}),
    "parquet-numbers": Case("a.parquet", parquet({"text": [1, 2]}), rejected={NOT_TEXT: 2}),
    "parquet-binary": Case("a.parquet", parquet({"text": [b"a", b"\xff"]}), rejected={NOT_TEXT: 2}),
    "parquet-lists": Case("a.parquet", parquet({"text": [["a"], [None], []]}), rejected={NOT_TEXT: 3}),
    "parquet-texts": Case("a.parquet", parquet({"text": ["a", "", "a\0", "a", " "]}), "", 1, 1, {EMPTY: 2, NUL: 1}),
    "parquet-invalid": Case(
        "a.parquet", parquet({"text": invalid_utf8()}), "row 2: .*invalid UTF-8 at its byte 2; write the row again"
    ),
    "parquet-dates": Case("a.parquet", parquet({"text": pa.array([2**60], pa.timestamp("ms"))}), UNREADABLE),
    "parquet-long-row": Case("a.parquet", parquet({"text": ["a", "a" * 20 * MIB]}), f"row 2: text is {LONG}"),
    "parquet-dictionary-bomb-19-GB": Case("a.parquet", many_groups("ab" * (MIB // 2), 2, 9500), BOMB),
    "parquet-dictionary-bomb-groups": Case("a.parquet", many_groups("ab" * MIB, 40, 500), BOMB),
    "parquet-plain-bomb": Case(
        "a.parquet", parquet({"text": ["a" * 8 * MIB] * 20}, use_dictionary=False, compression="zstd"), BOMB
    ),
    "parquet-large-column": Case(
        "a.parquet",
        parquet({"text": ["a" * 10 * MIB] * 30}, use_dictionary=False, compression="zstd"),
        "row group 1 is 300 MiB, at most 256; write it with smaller row groups",
    ),
    "parquet-delta-bomb": Case(
        "a.parquet",
        parquet(
            {"text": [f"{'a' * MIB}{i}" for i in range(200)]},
            use_dictionary=False,
            column_encoding="DELTA_BYTE_ARRAY",
            compression="zstd",
        ),
        BOMB,
    ),
    "parquet-null-bomb": Case("a.parquet", parquet({"text": pa.nulls(30_000_000, pa.string())}), BOMB),
    "parquet-list-bomb": Case(
        "a.parquet", parquet({"messages": [[USER] * 600_000]}), f"messages is {LONG}", format="chat"
    ),
    "parquet-nested-dictionary-bomb": Case(
        "a.parquet",
        parquet({"messages": [[{"role": "user", "content": "a" * MIB}] * 100]}),
        f"messages is {LONG}",
        format="chat",
    ),
    # completions and chat
    "completions-columns": Case(
        "a.jsonl", '{"prompt": "a"}\n', "no column completion .*; rename", format="completions"
    ),
    "completions-nulls": Case(
        "a.jsonl",
        lines({"prompt": "a", "completion": None}, {"prompt": 3, "completion": ""}, {"completion": "b"}),
        rejected={"completion is missing or null": 1, "prompt is not text": 1, "prompt is missing or null": 1},
        format="completions",
    ),
    "chat-shapes": Case(
        "a.jsonl",
        lines(chat(), {"messages": "hi"}, chat("hi"), chat(USER, {"role": "assistant"}), {"messages": {}}),
        rejected={NOT_MESSAGES: 5},
        format="chat",
    ),
    "chat-nested-nulls": Case(
        "a.jsonl",
        lines(chat(None), chat(USER, None), chat({"role": None, "content": None}, ANSWER), chat(USER, ANSWER)),
        used=1,
        rejected={NOT_MESSAGES: 2, "messages has a role other than system, user, assistant, tool": 1},
        format="chat",
    ),
    "chat-faults": Case(
        "a.jsonl",
        lines(
            chat(USER),
            chat(USER, ANSWER | {"tool_calls": [{}]}),
            chat(USER, ANSWER | {"weight": 0}),
            chat(USER, {"role": "assistant", "content": [1]}),
        ),
        rejected={
            "messages has no assistant message, so nothing would be learnt": 1,
            "messages has a message with more than role, content and tool calls (weights), which would be lost": 1,
            "messages has a tool call without a name, or whose arguments are no object": 1,
            "messages has a message whose content is not text": 1,
        },
        format="chat",
    ),
    "chat-parquet-nulls": Case(
        "a.parquet",
        parquet({"messages": [None, [None], [USER, ANSWER], [USER, {"role": "assistant", "content": None}]]}),
        used=1,
        rejected={
            "messages is missing or null": 1,
            NOT_MESSAGES: 1,
            "messages has a message whose content is not text": 1,
        },
        format="chat",
    ),
}
