"""Our tokenizer as the JSON of Hugging Face's `tokenizers`, with what `transformers` wants beside it.

A token's merge is found again from the ranks: joining its bytes by the ranks below its own leaves two parts.
"""

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

from magellano.tokenizer import Tokenizer, ranked

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
END = "<|endoftext|>"
# The template of magellano/data/formats.py. A user's text is not special there; transformers reads END in it as such.
CHAT = (
    "{{ bos_token }}{% for message in messages %}{% if not loop.first %}{{ '\\n\\n' }}{% endif %}"
    "### {{ message['role'] | capitalize }}:\n{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\n### Assistant:\\n' }}{% endif %}"
)


def save(folder: Path, tokenizer: Tokenizer, chat: bool) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json` into `folder`. A text starts with end-of-text, as in training.
    `chat`: with the chat template.
    """
    (folder / FILE).write_text(json.dumps(_json(tokenizer), ensure_ascii=False) + "\n", encoding="utf-8")
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": END,
        "eos_token": END,
        "unk_token": END,
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1 << 30,
    }
    if chat:
        config["chat_template"] = CHAT
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


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
