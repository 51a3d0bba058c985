"""The tokenizer: GPT-2's published ids, prefixes of it, round trips, and what it says to damaged input."""

import json
import socket
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from magellano import tokenizer
from magellano.errors import InputError
from magellano.tokenizer import Tokenizer

# Published examples: OpenAI's GPT-2 encoder and Hugging Face's documentation.
GPT2 = {
    "Hello world": [15496, 995],
    "The quick brown fox jumps over the lazy dog": [464, 2068, 7586, 21831, 18045, 625, 262, 16931, 3290],
    " hello": [23748],
    "": [],
}
SIZES = (257, 300, 4096, 50257)


@pytest.mark.parametrize(("text", "ids"), GPT2.items())
def test_full_size_gives_gpt2_ids(text: str, ids: list[int]) -> None:
    assert Tokenizer().encode(text) == ids


def test_end_of_text_is_the_last_id() -> None:
    assert Tokenizer().end_of_text == 50256
    assert Tokenizer(300).end_of_text == 299


@pytest.mark.parametrize("size", SIZES)
@settings(max_examples=50, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip(size: int, text: str) -> None:
    t = Tokenizer(size)
    ids = t.encode(text)
    assert t.decode(ids) == text
    assert all(0 <= i < t.end_of_text for i in ids)
    assert t.bytes_per_token()[ids].sum() == len(text.encode())


def test_smallest_size_spells_bytes() -> None:
    assert len(Tokenizer(257).encode("hello é")) == len("hello é".encode())


def test_special_tokens_in_text_are_plain_text() -> None:
    t = Tokenizer()
    ids = t.encode("a<|endoftext|>b")
    assert t.end_of_text not in ids
    assert t.decode(ids) == "a<|endoftext|>b"


def test_encode_many_is_encode_for_each() -> None:
    t, texts = Tokenizer(4096), ["one", "two words", "", "drei Wörter hier"] * 20
    assert t.encode_many(texts) == [t.encode(x) for x in texts]


def test_end_of_text_decodes_to_nothing_and_broken_utf8_to_a_mark() -> None:
    t = Tokenizer(257)
    first_byte = t.encode("é")[0]
    assert t.decode([t.end_of_text, *t.encode("hi"), t.end_of_text]) == "hi"
    assert t.decode([first_byte]) == "\ufffd"
    assert t.decode_bytes([first_byte]) == "é".encode()[:1]


def test_ids_outside_the_vocabulary_are_refused() -> None:
    with pytest.raises(InputError, match="token id 300 is outside"):
        Tokenizer(300).decode([300])


@pytest.mark.parametrize("size", [256, 50258])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(InputError, match=f"vocab_size {size}"):
        Tokenizer(size)


def test_save_and_load(tmp_path: Path) -> None:
    Tokenizer(300).save(tmp_path)
    assert Tokenizer.load(tmp_path).vocab_size == 300


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema is 2"),
        ({"kind": "wordpiece"}, "kind is 'wordpiece'"),
        ({"ranks_sha256": "0"}, "ranks_sha256 is '0'"),
        ({"vocab_size": "many"}, "vocab_size is 'many'"),
    ],
)
def test_load_refuses_what_it_cannot_read(tmp_path: Path, change: dict[str, object], message: str) -> None:
    Tokenizer(300).save(tmp_path)
    path = tmp_path / tokenizer.FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        Tokenizer.load(tmp_path)


def test_load_refuses_missing_and_malformed_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no tokenizer here"):
        Tokenizer.load(tmp_path)
    (tmp_path / tokenizer.FILE).write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        Tokenizer.load(tmp_path)


def test_damaged_ranks_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged = tmp_path / "ranks"
    damaged.write_bytes(tokenizer.RANKS.read_bytes()[:-20])
    monkeypatch.setattr(tokenizer, "RANKS", damaged)
    tokenizer.ranked.cache_clear()
    with pytest.raises(InputError, match="damaged"):
        tokenizer.ranked()


def test_needs_no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the tokenizer opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    tokenizer.ranked.cache_clear()
    tokenizer._encoding.cache_clear()
    assert Tokenizer(700).decode(Tokenizer(700).encode("offline")) == "offline"
