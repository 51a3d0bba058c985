"""Writing TOML, which the standard library only reads: plain values, arrays of them, and tables in tables."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any


def dumps(table: Mapping[str, Any]) -> str:
    """`table` as TOML that `tomllib.loads` reads back equal, but for keys whose value is None: they are left out."""
    return "\n".join(_lines(table, ())) + "\n"


def _lines(table: Mapping[str, Any], path: tuple[str, ...]) -> list[str]:
    lines = [f"{_string(k)} = {_value(v)}" for k, v in table.items() if v is not None and not isinstance(v, Mapping)]
    if path and (lines or not table):
        lines = ["", "[" + ".".join(map(_string, path)) + "]", *lines]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += _lines(value, (*path, key))
    return lines


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(int(value))
    if isinstance(value, float):
        return repr(value) if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return _string(value, bare=False)
    if isinstance(value, Mapping):  # in an array
        return "{" + ", ".join(f"{_string(k)} = {_value(v)}" for k, v in value.items() if v is not None) + "}"
    if isinstance(value, Sequence):
        return "[" + ", ".join(map(_value, value)) + "]"
    raise TypeError(f"{type(value).__name__} has no form in TOML here")


def _string(text: str, bare: bool = True) -> str:
    """A key as it is where TOML allows that, else a basic string, whose escapes are JSON's and one for DEL."""
    if bare and text and text.isascii() and text.replace("_", "").replace("-", "").isalnum():
        return text
    return json.dumps(str(text), ensure_ascii=False).replace("\x7f", "\\u007f")
