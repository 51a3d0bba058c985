"""Our tokenizer as the JSON of Hugging Face's `tokenizers`, and theirs as ours.

A token's merge is found again from the ranks: joining its bytes by the ranks below its own leaves two parts.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from magellano import files
from magellano.data.template import Template
from magellano.errors import InputError
from magellano.tokenizer import SCHEMA, Tokenizer, ranked

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
JSON_BYTES = 64 << 20
REMEDY = "import the model again from a folder with its tokenizer.json"
END = "<|endoftext|>"
# The template of magellano/data/formats.py. A user's text is not special there; transformers reads END in it as such.
CHAT = (
    "{{ bos_token }}{% if tools %}### Tools:{% for tool in tools %}{{ '\\n' + tool | tojson }}{% endfor %}{% endif %}"
    "{% for message in messages %}{% if tools or not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "### {{ message['role'] | capitalize }}:\n{{ message['content'] or '' }}"
    "{% for call in message['tool_calls'] or [] %}{% set call = call['function'] or call %}"
    "{{ '\\n' if message['content'] or not loop.first else '' }}"
    "{{ '{\"name\": ' + call['name'] | tojson + ', \"arguments\": ' }}"
    "{{ call['arguments'] if call['arguments'] is string else (call['arguments'] or {}) | tojson }}"
    "{{ '}' }}{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Assistant:\\n' }}{% endif %}"
)


def save(folder: Path, tokenizer: Tokenizer, chat: bool, template: Template | None = None) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `folder`. A text starts with end-of-text, as in training;
    an imported tokenizer is written as it came. `chat`: with a chat template, `template` or ours.
    """
    end, foreign = END, isinstance(tokenizer, Foreign)
    if isinstance(tokenizer, Foreign):
        end = tokenizer.spelled_end()
        (folder / FILE).write_bytes(tokenizer.data)
    else:
        (folder / FILE).write_text(json.dumps(_json(tokenizer), ensure_ascii=False) + "\n", encoding="utf-8")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": end,
        "eos_token": end,
        "unk_token": end,
        "add_bos_token": not foreign,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 30,
    }
    if chat:
        config["chat_template"] = CHAT if template is None else started(template.spelled(end))
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def started(source: str) -> str:
    """A template behind the end-of-text that starts every document of ours, its own bos_token left out, as in training.
    What follows an expression does not start a line: blanks that Jinja would strip before a block there go here.
    """
    return "{% set bos_token = '' %}{{ eos_token }}" + re.sub(r"\A[ \t]+(?=\{[%#](?!\+))", "", source)


def _json(tokenizer: Tokenizer) -> dict[str, Any]:
    end = tokenizer.end_of_text
    tokens = ranked(tokenizer.vocab_size - 1)
    vocabulary = {spelled(token): rank for rank, token in enumerate(tokens)} | {END: end}
    merges = [[spelled(a), spelled(b)] for a, b in _merges(tokens)]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": end, "content": END, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True},
        ],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": END, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": END, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": END, "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {END: {"id": END, "ids": [end], "tokens": [END]}},
        },
        "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
            "vocab": vocabulary, "merges": merges,
        },
    }  # fmt: skip


@cache
def _letters() -> dict[int, str]:
    """The printable character that stands for each byte: itself where Latin-1 prints it, else one from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(others)}


def spelled(token: bytes) -> str:
    return "".join(_letters()[byte] for byte in token)


def _merges(tokens: tuple[bytes, ...]) -> list[tuple[bytes, bytes]]:
    """The pair that each token of more than one byte is made of, in the order of the ranks."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return [_pair(token, ranks) for token in tokens if len(token) > 1]


def _pair(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        pairs = [(ranks.get(a + b, len(ranks)), i) for i, (a, b) in enumerate(itertools.pairwise(parts))]
        rank, i = min(pairs)
        assert rank < ranks[token], token
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


class Foreign(Tokenizer):
    """Another model's byte-level BPE, by the `tokenizers` package: its JSON lies in a folder beside our description."""

    JSON, KIND = "tokenizers.json", "tokenizers-json"

    def __init__(self, path: Path, vocab_size: int, end_of_text: int):
        """`vocab_size` may be larger than the tokens that the file has: a model pads. InputError where the file is no
        such tokenizer, or `tokenizers` is not installed.
        """
        try:
            import tokenizers
        except ModuleNotFoundError:
            raise InputError(f"{path}: needs the package tokenizers; install scm-magellano[exchange]") from None
        with files.opened(path, REMEDY) as fd:
            size = os.fstat(fd).st_size
            if size > JSON_BYTES:
                raise InputError(
                    f"{path}: {size:,} bytes, more than the {JSON_BYTES:,} that a tokenizer may have; {REMEDY}"
                )
            data = files.read_at(fd, 0, size)
        try:
            described = files.parse(data)
            model = described["model"]
            if model.get("type") != "BPE" or (described.get("decoder") or {}).get("type") != "ByteLevel":
                raise ValueError("not a byte-level BPE")
            self._inner = tokenizers.Tokenizer.from_str(data.decode("utf-8"))
        except Exception as e:  # tokenizers raises a plain Exception
            raise InputError(f"{path}: not a tokenizer that is known here: {files.told(e)}; {REMEDY}") from None
        self._inner.no_truncation()
        self._inner.no_padding()
        self.data, self.vocab_size, self.end_of_text = data, vocab_size, end_of_text
        bytes_of = {letter: byte for byte, letter in _letters().items()}
        self._bytes = [b""] * vocab_size
        special = {int(t["id"]) for t in described.get("added_tokens", []) if t.get("special")}
        for token, n in self._inner.get_vocab(with_added_tokens=True).items():
            if not 0 <= n < vocab_size:
                raise InputError(f"{path}: token {n} is outside the model's vocabulary of {vocab_size}; {REMEDY}")
            known = all(letter in bytes_of for letter in token)
            spelling = bytes(bytes_of[letter] for letter in token) if known else token.encode("utf-8")
            self._bytes[n] = b"" if n in special else spelling
        for added in described.get("added_tokens", []):  # they stand for themselves
            if not added.get("special"):
                self._bytes[int(added["id"])] = str(added["content"]).encode("utf-8")

    def spelled_end(self) -> str:
        """The end-of-text token as the file has it."""
        return str(self._inner.id_to_token(self.end_of_text))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, without tokens before or behind it."""
        return self._inner.encode(text, add_special_tokens=False).ids

    def encode_many(self, texts: Sequence[str], threads: int = 2) -> list[list[int]]:
        return [one.ids for one in self._inner.encode_batch(list(texts), add_special_tokens=False)]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        if wrong := next((i for i in ids if not 0 <= i < self.vocab_size), None):
            raise InputError(f"token id {wrong} is outside the vocabulary of {self.vocab_size}")
        return b"".join(self._bytes[int(i)] for i in ids if i != self.end_of_text)

    def bytes_per_token(self) -> np.ndarray:
        sizes = np.array([len(token) for token in self._bytes], dtype=np.int32)
        sizes[self.end_of_text] = 0
        return sizes

    def save(self, folder: Path) -> None:
        """Write the JSON and what it is into `folder`."""
        (folder / self.JSON).write_bytes(self.data)
        facts = {
            "schema": SCHEMA,
            "kind": self.KIND,
            "vocab_size": self.vocab_size,
            "end_of_text": self.end_of_text,
            "sha256": hashlib.sha256(self.data).hexdigest(),
        }
        (folder / FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path, facts: dict[str, Any]) -> "Foreign":
        """What `save` wrote, described by `facts`."""
        size, end, path = facts.get("vocab_size"), facts.get("end_of_text"), folder / cls.JSON
        if type(size) is not int or type(end) is not int or not 0 <= end < size <= 1 << 16:
            raise InputError(f"{folder / FILE}: vocab_size and end_of_text are not those of a tokenizer; {REMEDY}")
        made = cls(path, size, end)
        if hashlib.sha256(made.data).hexdigest() != facts.get("sha256"):
            raise InputError(f"{path}: not the file that was imported (its SHA-256 differs); {REMEDY}")
        return made
