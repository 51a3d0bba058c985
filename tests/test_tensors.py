"""Hostile safetensors files: refused in one line before MLX or a reader of tensors sees them."""

import json
import os
import socket
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from magellano import files, headers, tensors
from magellano.backend import mx
from magellano.errors import InputError

FILE = "model.safetensors"
A = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
B = {"dtype": "U8", "shape": [5], "data_offsets": [24, 29]}
DATA = bytes(range(29))


def packed(header: bytes | dict[str, Any], data: bytes = DATA, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one(data: bytes = b"\0" * 4, **changed: Any) -> bytes:
    """A file of one tensor `x`, float32 [1], with some of its entry changed."""
    return packed({"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changed}, data)


def raw(entry: str, data: bytes = b"\0" * 4) -> bytes:
    return packed(entry.encode(), data)


def named(name: str) -> bytes:
    return packed({name: A, "b": B})


X = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
DIGITS = "9" * 5000

# what it is: (the file's bytes, what the message must say)
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "0 bytes, too short"),
    "seven bytes": (b"\0" * 7, "7 bytes, too short"),
    "length alone": (struct.pack("<Q", 100), "a header of 100 bytes; there are 0"),
    "length zero": (b"\0" * 8, "does not start with {"),
    "length of 2^64-1": (packed({}, b"", length=2**64 - 1), "a header of 18,446,744,073,709,551,615 bytes"),
    "length of 2^63": (packed({"a": A, "b": B}, length=2**63), "a header of 9,223,372,036,854,775,808 bytes"),
    "length beyond the file": (packed({"a": A, "b": B}, length=10**6), "a header of 1,000,000 bytes"),
    "length cuts the header": (packed({"a": A, "b": B}, length=40), "not valid JSON"),
    "length takes in data": (packed({"a": A, "b": B}, length=120), "not valid JSON"),
    "a header of 17 MB": (packed(b"{" + b" " * (17 << 20) + b"}", b""), "a header of 17,825,794 bytes"),
    "not JSON": (raw("{hello}"), "not valid JSON"),
    "a list": (raw("[]", b""), "does not start with {"),
    "a space first": (raw(' {"x":' + X + "}"), "does not start with {"),
    "a byte order mark": (packed(b"\xef\xbb\xbf{}", b""), "does not start with {"),
    "not UTF-8": (packed(b'{"\xff\xfe":' + X.encode() + b"}", b"\0" * 4), "not UTF-8 (byte 2)"),
    "NUL in the header": (packed(b'{"x\0":' + X.encode() + b"}", b"\0" * 4), "not valid JSON"),
    "two objects": (raw('{"x":' + X + "}{}"), "not valid JSON"),
    "deep nesting": (raw('{"x":' + "[" * 100_000 + "]" * 100_000 + "}"), "nested too deep"),
    "deep objects": (raw('{"a":' * 100_000 + "1" + "}" * 100_000), "nested too deep"),
    "a name twice": (raw('{"x":' + X + ',"x":' + X + "}"), "the key 'x' stands twice"),
    "shape twice": (raw('{"x":{"dtype":"F32","shape":[9],"shape":[1],"data_offsets":[0,4]}}'), "'shape' stands twice"),
    "metadata twice": (raw('{"__metadata__":{},"__metadata__":{},"x":' + X + "}"), "'__metadata__' stands twice"),
    "metadata a list": (raw('{"__metadata__":[1],"x":' + X + "}"), "__metadata__ must map"),
    "metadata of numbers": (raw('{"__metadata__":{"a":1},"x":' + X + "}"), "__metadata__ must map"),
    "NaN": (raw('{"x":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}'), "NaN is no number"),
    "infinity": (raw('{"x":{"dtype":"F32","shape":[Infinity],"data_offsets":[0,4]}}'), "Infinity is no number"),
    "1e999": (raw('{"x":{"dtype":"F32","shape":[1e999],"data_offsets":[0,4]}}'), "1e999 is too large"),
    "5,000 digits": (raw('{"x":{"dtype":"F32","shape":[' + DIGITS + '],"data_offsets":[0,4]}}'), "not valid JSON"),
    "an entry that is null": (raw('{"x":null}', b""), "tensor x: must have dtype"),
    "an entry without dtype": (raw('{"x":{"shape":[1],"data_offsets":[0,4]}}'), "tensor x: must have dtype"),
    "an entry with more": (one(pickle="gASVC"), "and nothing else"),
    "an unknown dtype": (one(dtype="F128"), "tensor x: dtype 'F128' is not one of"),
    "an object's dtype": (one(dtype="O"), "tensor x: dtype 'O' is not one of"),
    "dtype a list": (one(dtype=["F32"]), "tensor x: dtype ['F32'] is not one of"),
    "dtype of a megabyte": (one(dtype="F" * 1_000_000), "tensor x: dtype 'FFFF"),
    "float64": (one(b"\0" * 8, dtype="F64", data_offsets=[0, 8]), "tensor x: dtype 'F64' is not one of"),
    "4-bit floats": (one(b"\0", dtype="F4", shape=[2], data_offsets=[0, 1]), "tensor x: dtype 'F4' is not one of"),
    "a negative size": (one(shape=[-1]), "tensor x: shape [-1] is not"),
    "two negative sizes": (one(shape=[-1, -1]), "tensor x: shape [-1, -1] is not"),
    "a fractional size": (one(shape=[1.0]), "tensor x: shape [1.0] is not"),
    "a size that is true": (one(shape=[True]), "tensor x: shape [True] is not"),
    "a size that is text": (one(shape=["1"]), "tensor x: shape ['1'] is not"),
    "shape a number": (one(shape=1), "tensor x: shape 1 is not"),
    "65 dimensions": (one(shape=[1] * 65), "tensor x: shape [1, 1"),
    "an enormous size": (one(shape=[10**18]), "tensor x: shape [1000000000000000000] is not"),
    "a size of 2^32 + 1": (one(shape=[2**32 + 1]), "tensor x: shape [4294967297] is not"),
    "an empty one of 2^40": (one(b"", shape=[0, 2**40], data_offsets=[0, 0]), "tensor x: shape [0, 1099511627776] is"),
    "sizes that overflow": (one(shape=[2**31 - 1] * 5), "tensor x: shape and dtype need"),
    "offsets reversed": (one(data_offsets=[4, 0]), "its data_offsets leave -4"),
    "negative offsets": (one(data_offsets=[-4, 0]), "tensor x: data_offsets [-4, 0] are not"),
    "one offset": (one(data_offsets=[4]), "tensor x: data_offsets [4] are not"),
    "three offsets": (one(data_offsets=[0, 4, 8]), "tensor x: data_offsets [0, 4, 8] are not"),
    "enormous offsets": (one(data_offsets=[2**63, 2**63 + 4]), "tensor x leaves a hole"),
    "offsets of 4,000 digits": (one(data_offsets=[0, 10**4000]), "its data_offsets leave a number of 13288 bits"),
    "too few bytes": (one(b"\0" * 3), "its tensors take 4 bytes, behind the header there are 3"),
    "trailing bytes": (one(b"\0" * 5), "its tensors take 4 bytes, behind the header there are 5"),
    "a pickle behind it": (one(b"\0" * 4 + b"\x80\x04."), "its tensors take 4 bytes, behind the header there are 7"),
    "overlap": (packed({"a": A, "b": B | {"data_offsets": [20, 25]}}), "tensor b overlaps the one before"),
    "the same bytes twice": (packed({"a": A, "c": A}, DATA[:24]), "tensor c overlaps the one before"),
    "a hole": (packed({"a": A, "b": B | {"data_offsets": [25, 30]}}, DATA + b"\0"), "tensor b leaves a hole"),
    "a hole at the start": (one(b"\0" * 8, data_offsets=[4, 8]), "tensor x leaves a hole"),
    "a name of 10,000": (named("a" * 10_000), "a tensor's name has 10,000 characters"),
    "no name": (named(""), "tensor '': a name has letters"),
    "an absolute path": (named("/etc/passwd"), "tensor '/etc/passwd': a name has"),
    "a path upwards": (named("../../x"), "tensor '../../x': a name has"),
    "dots alone": (named("a..b"), "tensor 'a..b': a name has"),
    "a Windows path": (named("C:\\x"), "tensor 'C:\\\\x': a name has"),
    "a line break": (named("a\nInputError: all fine"), "tensor 'a\\nInputError: all fine': a name has"),
    "an escape sequence": (named("\x1b[2J"), "tensor '\\x1b[2J': a name has"),
    "a lone surrogate": (raw('{"\\ud800":' + X + "}"), "tensor '\\ud800': a name has"),
    "NUL escaped": (named("x\0y"), "tensor 'x\\x00y': a name has"),
    "200,000 tensors": (
        packed({f"t{n}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(200_000)}, b""),
        "200,000 tensors, more than 131,072",
    ),
    "a pickle": (b"\x80\x04\x95\x1f\0\0\0\0\0\0\0\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R.", "a header of"),
    "a zip, as torch saves": (b"PK\x03\x04" + b"\0" * 60, "a header of"),
}  # fmt: skip


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE) >= 40


def test_a_good_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.write_bytes(packed({"__metadata__": {"format": "pt"}, "b": B, "a": A}))
    read = tensors.load_file(path)
    assert {name: bytes_of(value) for name, value in read.items()} == {"a": DATA[:24], "b": DATA[24:]}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """One line that names the file, what is wrong with it and what to do; MLX has not seen the file."""
    monkeypatch.setattr(mx, "load", lambda *a, **k: pytest.fail("MLX read it"))
    data, said = HOSTILE[what]
    path = tmp_path / FILE
    path.write_bytes(data)
    with pytest.raises(InputError) as refused:
        tensors.load_file(path)
    one_line(refused.value, str(path), "not a readable safetensors file", said, headers.REMEDY)


def one_line(error: InputError, *said: str) -> None:
    text = str(error)
    for part in said:
        assert part in text
    assert text.isprintable(), ascii(text)
    assert len(text) < 700


def test_mlx_alone_would_have_taken_some_of_them(tmp_path: Path) -> None:
    """The reason for all this: were it gone, the rules could go too."""
    path = tmp_path / FILE
    for what in ("overlap", "a hole", "trailing bytes", "a path upwards"):
        path.write_bytes(HOSTILE[what][0])
        assert mx.load(str(path)), what


def fifo(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's path may have 107 bytes
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def link_to(target: str) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        (path.parent / "good").write_bytes(packed({"a": A, "b": B}))
        path.symlink_to(target)

    return make


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "nothing": (lambda path: None, "cannot be opened (No such file or directory)"),
    "a folder": (Path.mkdir, "a folder, not a regular file"),
    "a FIFO": (fifo, "a FIFO, not a regular file"),
    "a socket": (unix_socket, "a socket, not a regular file"),
    "a link to a good file": (link_to("good"), "a symbolic link, which could lead anywhere; put the file itself"),
    "a link to a device": (link_to("/dev/zero"), "a symbolic link"),
    "a link to itself": (link_to(FILE), "a symbolic link"),
    "a dangling link": (link_to("nowhere"), "a symbolic link"),
}


@pytest.mark.parametrize("what", NO_FILES)
def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path, what: str) -> None:
    make, said = NO_FILES[what]
    path = tmp_path / FILE
    make(path)
    for read in (tensors.load_file, lambda p: files.read_json(p, headers.REMEDY)):
        with pytest.raises(InputError) as refused:
            read(path)
        one_line(refused.value, str(path), said)


def test_a_device_is_refused() -> None:
    with pytest.raises(InputError, match=r"^/dev/zero: a device, not a regular file; "):
        tensors.load_file(Path("/dev/zero"))


def test_a_file_that_is_swapped_after_the_check_changes_nothing(tmp_path: Path) -> None:
    """MLX gets the file that was checked: another one under its name, is not read."""
    path = tmp_path / FILE
    path.write_bytes(packed({"a": A, "b": B}))

    def swap(header: headers.Header) -> None:
        path.unlink()
        path.write_bytes(packed({"a": A, "b": B}, DATA[::-1]))

    assert bytes_of(tensors.load_file(path, swap)["a"]) == DATA[:24]


def test_a_folder_swapped_while_it_is_read_never_gives_other_bytes(tmp_path: Path) -> None:
    """A thread renames a good and a malformed file over the name: each load gives the good one's bytes or refuses."""
    path, stop = tmp_path / FILE, threading.Event()
    good, bad = packed({"a": A, "b": B}), packed({"a": A, "b": B | {"data_offsets": [20, 25]}})
    path.write_bytes(good)

    def swap() -> None:
        while not stop.is_set():
            for data in (bad, good):
                (tmp_path / "new").write_bytes(data)
                (tmp_path / "new").rename(path)

    thread = threading.Thread(target=swap)
    thread.start()
    outcomes = set()
    try:
        for _ in range(300):
            try:
                assert bytes_of(tensors.load_file(path)["b"]) == DATA[24:]
                outcomes.add("read")
            except InputError as e:
                outcomes.add("refused" if "overlaps" in str(e) else str(e))
    finally:
        stop.set()
        thread.join()
    assert "read" in outcomes
    assert outcomes <= {"read", "refused"}


def test_only_the_header_is_read(tmp_path: Path) -> None:
    """A sparse file of 64 GB is checked at once, and none of its tensors is in memory."""
    path, size = tmp_path / FILE, 1 << 36
    entries = {f"t{n}": {"dtype": "U8", "shape": [1 << 30], "data_offsets": [n << 30, n + 1 << 30]} for n in range(64)}
    path.write_bytes(packed(entries, b""))
    os.truncate(path, path.stat().st_size + size)
    before = mx.get_active_memory()
    assert len(tensors.load_file(path)) == 64
    assert mx.get_active_memory() == before


def bytes_of(value: mx.array) -> bytes:
    return b"" if value.size == 0 else bytes(memoryview(mx.contiguous(value.reshape(-1)).view(mx.uint8)))
