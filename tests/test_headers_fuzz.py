"""Changed safetensors headers: refused in one line, or read as the `safetensors` package reads them.

MAGELLANO_FUZZ_HEADERS=100000 python -m pytest tests/test_headers_fuzz.py -s    what `make torture` does, half a minute
"""

import json
import os
import random
import struct
from pathlib import Path
from typing import Any

import safetensors
from safetensors import SafetensorError, safe_open

from magellano import headers, tensors
from magellano.backend import mx
from magellano.errors import InputError

HEADERS = int(os.environ.get("MAGELLANO_FUZZ_HEADERS", "2000"))
SEED = int(os.environ.get("MAGELLANO_FUZZ_SEED", "7"))
FILE = "model.safetensors"
A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "U8", "shape": [5], "data_offsets": [24, 29]}


def bytes_of(value: mx.array) -> bytes:
    return b"" if value.size == 0 else bytes(memoryview(mx.contiguous(value.reshape(-1)).view(mx.uint8)))


def one_line(error: InputError, path: Path) -> None:
    text = str(error)
    assert text.startswith(f"{path}: damaged, not a readable safetensors file: ")
    assert text.endswith(headers.REMEDY)
    assert text.isprintable(), ascii(text)
    assert len(text) < 700


def packed(header: bytes, data: bytes, length: int) -> bytes:
    return struct.pack("<Q", length) + header + data


SEEDS = [
    {"a": A, "b": B},
    {"__metadata__": {"format": "pt"}, "x": {"dtype": "BF16", "shape": [4, 3], "data_offsets": [0, 24]}},
    {"e": {"dtype": "I64", "shape": [0, 7], "data_offsets": [0, 0]}, "b": {**B, "data_offsets": [0, 5]}},
    {"s": {"dtype": "BOOL", "shape": [], "data_offsets": [0, 1]}, "t": {**A, "data_offsets": [1, 25]}},
]  # fmt: skip
PIECES = [
    b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"0", b"-1", b"1e3", b"1.0", b"true", b"null", b"NaN", b"F16",
    b"\\u0000", b"\\ud800", b"\xff", b"\xc3\xa9", b" ", b"\t", b"\0", b"99999999999999999999", b"2147483648", b"/",
    b'"a"', b'"shape":[1],', b'"__metadata__":{},', b"24", b"29", b"[]", b'"\\u0061"', b"..", b"U8",
]  # fmt: skip
VALUES = [0, 1, 2, 3, 5, 6, 24, 29, -1, 1.0, True, None, "1", [], {}, 2**31, 2**32 + 1, 2**63, 10**30]
NAMES = {
    "BOOL": "bool_", "U8": "uint8", "I8": "int8", "U16": "uint16", "I16": "int16", "F16": "float16", "BF16": "bfloat16",
    "U32": "uint32", "I32": "int32", "F32": "float32", "U64": "uint64", "I64": "int64",
}  # fmt: skip


def mutated(rng: random.Random) -> bytes:
    """A file whose header has a few changes, of bytes or values, mostly with data of the length that fits."""
    seed = json.loads(json.dumps(rng.choice(SEEDS)))
    size = max(e["data_offsets"][1] for e in seed.values() if "data_offsets" in e)
    if rng.random() < 0.5:
        for _ in range(rng.choice((1, 1, 1, 1, 2, 3))):
            change_a_value(rng, seed)
        items = list(seed.items())
        rng.shuffle(items)
        header = bytearray(json.dumps(dict(items)).encode())
    else:
        header = bytearray(json.dumps(seed, separators=(",", ":")).encode())
        for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
            change_bytes(rng, header)
    header += b" " * rng.choice((0, 0, 0, 1, 7))
    size = rng.choice((size, size, size, size, size - 1, size + 1, rng.randrange(64)))
    odd = rng.choice((-1, 1, 8, -8, 1 << 40)) if rng.random() < 0.03 else 0
    return packed(bytes(header), rng.randbytes(size), max(0, len(header) + odd))


def change_a_value(rng: random.Random, header: dict[str, Any]) -> None:
    name = rng.choice([n for n in header if n != "__metadata__"])
    entry = header[name]
    match rng.randrange(9):
        case 0:
            entry["dtype"] = rng.choice([*headers.BYTES, "F64", "F8_E4M3", "C64", "f32"])
        case 1:
            entry["shape"] = [rng.choice(VALUES) for _ in range(rng.randrange(4))]
        case 2:
            entry[rng.choice(("shape", "data_offsets"))] = rng.choice(VALUES)
        case 3:
            entry["data_offsets"] = [rng.choice(VALUES) for _ in range(2)]
        case 4:
            header[rng.choice(("c", "b", "z.weight", "a/b", "..", "\N{SNOWMAN}", "x" * 257))] = dict(entry)
        case 5 | 6 | 7 if isinstance(entry["shape"], list):  # still sound: the same bytes in another shape, or type
            entry["shape"] = [*reversed(entry["shape"]), *[1] * rng.randrange(8)]
            same = [t for t, width in headers.BYTES.items() if width == headers.BYTES.get(entry["dtype"])]
            entry["dtype"] = rng.choice(same or ["F32"])
        case _:  # still sound: another name
            header[rng.choice(("c", "z.weight", "__metadata__x"))] = header.pop(name)


def change_bytes(rng: random.Random, header: bytearray) -> None:
    at = rng.randrange(len(header) or 1)
    match rng.randrange(6):
        case 0:
            header[at : at + 1] = rng.randbytes(1)
        case 1:
            header[at : at + rng.randrange(1, 8)] = b""
        case 2:
            header[at:at] = rng.choice(PIECES)
        case 3:
            header[at:at] = header[at : at + rng.randrange(1, 30)]
        case 4:
            header[at : at + 1] = rng.choice(PIECES)
        case 5:  # another digit: shapes and offsets that nearly fit
            if digits := [i for i, c in enumerate(header) if c in b"0123456789"]:
                header[rng.choice(digits)] = rng.choice(b"0123456789")


def test_fuzzed_headers_are_refused_or_read_as_the_package_reads_them(tmp_path: Path) -> None:
    """InputError or the package's own bytes for every tensor; never another exception. Both outcomes must happen."""
    path, rng = tmp_path / FILE, random.Random(SEED)
    read = refused = stricter = 0
    for number in range(HEADERS):
        data = mutated(rng)
        path.unlink(missing_ok=True)  # a new file costs a tenth of truncating the old one
        path.write_bytes(data)
        try:
            found = {name: (v.dtype, list(v.shape), bytes_of(v)) for name, v in tensors.load_file(path).items()}
        except InputError as e:
            refused += 1
            one_line(e, path)
            stricter += package_takes(path)
            continue
        wanted = {
            name: (getattr(mx, NAMES[facts["dtype"]]), facts["shape"], bytes(facts["data"]))
            for name, facts in safetensors.deserialize(data)
        }
        assert found == wanted, f"header {number}: {data!r}"
        read += 1
    print(f"{HEADERS} headers: {read} read, {refused} refused, of which the package alone would take {stricter}")
    assert read > HEADERS // 20
    assert refused > HEADERS // 4
    assert stricter > 0


def package_takes(path: Path) -> bool:
    try:
        with safe_open(path, framework="numpy"):
            return True
    except (SafetensorError, OSError):
        return False
