"""A context in a file: what a model has read, to go on from later without reading it again.

One safetensors file: the tokens, the logits after them, the state of each Mamba layer, and the digest of the model that
made it, for in another model the numbers mean nothing. It holds its tokens in the clear: the file is its owner's alone.
"""

import hashlib
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from magellano import disk, durable, files
from magellano.backend import mx
from magellano.decode import folded
from magellano.errors import InputError
from magellano.generate import Context
from magellano.headers import Header
from magellano.model import MagellanoLM
from magellano.tensors import load_file

SUFFIX = ".safetensors"
TOKENS = 1 << 24  # that a file may hold
_DTYPES = {mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16"}
_REMEDY = "read the prompt again with --save-state"


def identity(folders: Sequence[Path]) -> bytes:
    """SHA-256 of a model in files: of each folder's manifest, which has every file's digest, or of its files."""
    digest = hashlib.sha256()
    for folder in folders:
        manifest = folder / "manifest.json"
        listed = [manifest] if manifest.is_file() else sorted(folder.glob("*.json")) + sorted(folder.glob(f"*{SUFFIX}"))
        if not listed:
            raise InputError(f"{folder}: no model in it")
        for path in listed:
            digest.update(f"{path.name} {durable.sha256_file(path)}\n".encode())
    return digest.digest()


def check(path: Path) -> None:
    """InputError where no state can be saved to `path`."""
    if path.suffix != SUFFIX:
        raise InputError(f"{path}: a state file ends in {SUFFIX}; name it so")
    if not path.parent.is_dir():
        raise InputError(f"{path}: its folder is not there; make it first")


def save(path: Path, context: Context, model: bytes) -> None:
    """Write `context` to `path`, whole or not at all; what stood there is replaced. InputError where it cannot be."""
    check(path)
    tensors = {
        "model": mx.array(np.frombuffer(model, dtype=np.uint8)),
        "tokens": mx.array(context.tokens, dtype=mx.int32),
        "logits": context.logits_BV.astype(mx.float32),
    }
    for index, layer in enumerate(context.state):
        if layer is not None:
            tensors |= {f"layers.{index}.conv": layer.conv_BKI, f"layers.{index}.scan": layer.scan_BIN}
    with disk.told_when_full(path.parent), tempfile.TemporaryDirectory(prefix=".magellano-", dir=path.parent) as own:
        written = Path(own) / f"state{SUFFIX}"
        mx.save_safetensors(str(written), tensors)
        written.chmod(0o600)
        durable.fsync(written)
        os.replace(written, path)
        durable.fsync(path.parent)


def load(path: Path, model: MagellanoLM, identity: bytes) -> Context:
    """The context that `save` wrote. InputError where the file is another, or made by another model, or with other
    settings of its compute.
    """
    like = model.initial_state(1)
    wanted: dict[str, tuple[tuple[int, ...], str]] = {
        "model": ((len(identity),), "U8"),
        "logits": ((1, model.config.vocab_size), "F32"),
    }
    for index, layer in enumerate(like):
        if layer is not None:
            wanted[f"layers.{index}.conv"] = tuple(layer.conv_BKI.shape), _DTYPES[layer.conv_BKI.dtype]
            wanted[f"layers.{index}.scan"] = tuple(layer.scan_BIN.shape), "F32"
    read = load_file(path, lambda header: _check(path, header, wanted))
    mx.eval(read)
    if bytes(np.array(read["model"])) != identity:
        raise InputError(f"{path}: the state of another model, or of this one before it was trained anew; {_REMEDY}")
    tokens = np.array(read["tokens"])
    if ((tokens < 0) | (tokens >= model.config.vocab_size)).any():
        raise InputError(f"{path}: tokens outside the vocabulary of {model.config.vocab_size}; {_REMEDY}")
    arrays = [read[f"layers.{n}.{part}"] for n, x in enumerate(like) if x is not None for part in ("conv", "scan")]
    if not all(mx.isfinite(x).all().item() for x in [read["logits"], *arrays]):
        raise InputError(f"{path}: numbers that are not finite; {_REMEDY}")
    return Context(tuple(tokens.tolist()), folded(arrays, like), read["logits"])


def _check(path: Path, header: Header, wanted: dict[str, tuple[tuple[int, ...], str]]) -> None:
    if wrong := sorted(header.keys() ^ {*wanted, "tokens"}):
        what = "stands in it" if wrong[0] in header else "is missing"
        raise InputError(f"{path}: not a state of this model: {files.shown(wrong[0])} {what}; {_REMEDY}")
    for name, entry in header.items():
        shape, dtype = wanted.get(name, (entry.shape, "I32"))
        if (entry.shape, entry.dtype) != (shape, dtype):
            found = f"{name} is {entry.dtype} {entry.shape}, not {dtype} {shape}"
            raise InputError(f"{path}: not a state of this model as it computes here: {found}; {_REMEDY}")
    size = header["tokens"].shape
    if len(size) != 1 or not 1 <= size[0] <= TOKENS:
        raise InputError(f"{path}: tokens have the shape {size}; 1 to {TOKENS:,} in a row may be; {_REMEDY}")
