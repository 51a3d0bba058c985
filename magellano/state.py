"""Checkpoints of a running training: parameters, optimiser, loss scale and position, sealed; ordered by step, never by
clock.

    work/step-000000100/                    whole and verified, or not there
        checkpoint.json                     the seal: schema, step and the trainer's facts, each file's size and SHA-256
        parameters.safetensors
        optimizer.safetensors
    work/.tmp-*                             being written, or left by a process that died
    work/.damaged-step-000000100            found damaged, kept for a look

The last two stay, and the best: the one with the lowest "held_out_loss" in its seal, which stands nowhere else.
"""

import errno
import logging
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magellano import disk, durable, files, headers
from magellano.backend import mx
from magellano.errors import InputError
from magellano.tensors import load_file

log = logging.getLogger(__name__)

SCHEMA = 2  # 2: the guard's memory, held-out loss, a seal over the seal
SEAL, PARAMETERS, OPTIMIZER = "checkpoint.json", "parameters.safetensors", "optimizer.safetensors"
KEPT = 2  # verified checkpoints that stay
PREFIX, ASIDE = "step-", ".damaged-"
HELD_OUT = "held_out_loss"  # the fact that makes one the best
OVERHEAD = 1 << 20  # bytes of a checkpoint beside its tensors, amply
_NAME = re.compile(rf"{PREFIX}(\d{{9,}})", re.ASCII)


@dataclass(frozen=True)
class Found:
    """A checkpoint that was verified and read."""

    step: int
    parameters: dict[str, mx.array]
    optimizer: dict[str, mx.array]
    facts: dict[str, Any]


def save(
    folder: Path, step: int, parameters: dict[str, mx.array], optimizer: dict[str, mx.array], facts: dict[str, Any]
) -> None:
    """Write folder/step-N whole or not at all, then drop what need not stay. Raises DiskFull where space runs out; what
    was there before is then as it was.
    """
    durable.private_folder(folder)
    final = folder / f"{PREFIX}{step:09d}"
    temporary = folder / f"{durable.TEMPORARY}{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with disk.told_when_full(folder, need=size(parameters, optimizer)):
            durable.private_folder(temporary)
            _write(temporary / PARAMETERS, parameters)
            _write(temporary / OPTIMIZER, optimizer)
            durable.seal(temporary, SEAL, {**facts, "schema": SCHEMA, "step": step})
            durable.publish(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _rotate(folder, final)


def size(parameters: dict[str, mx.array], optimizer: dict[str, mx.array]) -> int:
    """Bytes that a checkpoint of these takes at most."""
    return sum(a.nbytes for tensors in (parameters, optimizer) for a in tensors.values()) + OVERHEAD


def latest(folder: Path, at_most: int | None = None) -> Found | None:
    """The newest checkpoint, of a step up to `at_most`, whose sizes and SHA-256 hold, or None; damaged ones are set
    aside with a warning. InputError for one of another version.
    """
    for path in reversed(by_step(folder)):
        if (at_most is None or _step(path) <= at_most) and _sound(path):
            try:
                return _read(path)
            except InputError as e:
                _set_aside(path, str(e))
    return None


def by_step(folder: Path) -> list[Path]:
    """The checkpoints below `folder`, whether sound or not, the oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if _NAME.fullmatch(path.name)] if folder.is_dir() else []
    return sorted(found, key=_step)


def best(folder: Path) -> tuple[Path, float] | None:
    """The checkpoint with the lowest held-out loss, the earliest of several, and that loss; None where none has one."""
    found = [(loss, path) for path in by_step(folder) if (loss := _held_out(path)) is not None]
    if not found:
        return None
    loss, path = min(found, key=lambda pair: (pair[0], _step(pair[1])))
    return path, loss


def forget_after(folder: Path, step: int) -> None:
    """Remove the checkpoints of later steps: the training was set back, and will not pass through them again."""
    for path in by_step(folder):
        if _step(path) > step:
            _remove(path)


def remove_leftovers(folder: Path) -> None:
    """Remove what a process that died was writing; what it had moved out of the way for that goes back."""
    durable.put_back(folder)
    for path in folder.glob(f"{durable.TEMPORARY}*"):
        shutil.rmtree(path)


def _write(path: Path, tensors: dict[str, mx.array]) -> None:
    try:
        mx.save_safetensors(str(path), tensors)
    except RuntimeError as e:  # MLX does not say why a write failed, but the next one does, if it fails too
        with open(path, "ab") as f:
            f.write(bytes(1 << 16))
            f.flush()
            os.fsync(f.fileno())
        raise OSError(errno.EIO, f"a write failed: {e}", str(path)) from e
    with headers.checked(path):  # whole: as long as its header says
        pass


def _rotate(folder: Path, newest: Path) -> None:
    """Drop all but the last two, of which the older is hashed again before any goes, and the best."""
    others = [path for path in by_step(folder) if _step(path) < _step(newest)]
    if len(others) < KEPT:
        return
    top, sound = best(folder), 1
    for path in reversed(others):
        if sound < KEPT:
            sound += _sound(path)
        elif top is None or path != top[0]:
            _remove(path)


def _remove(path: Path) -> None:
    """Out of sight first: whoever dies meanwhile leaves nothing half under its name."""
    gone = path.with_name(f"{durable.TEMPORARY}gone-{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    path.rename(gone)
    shutil.rmtree(gone)


def _read(path: Path) -> Found:
    parameters, optimizer = load_file(path / PARAMETERS), load_file(path / OPTIMIZER)
    mx.eval(parameters, optimizer)  # mx.load is lazy
    return Found(_step(path), parameters, optimizer, _seal(path))


def _sound(path: Path) -> bool:
    """Whether the checkpoint can be trusted; set aside where not. InputError for one of another version."""
    why = durable.damage(path, SEAL)
    try:
        facts = _seal(path)
    except InputError as e:
        facts, why = {}, why or str(e)
    schema = facts.get("schema")
    if schema is not None and schema != SCHEMA and (why is None or durable.SELF not in facts):
        raise InputError(
            f"{path}: checkpoint schema {files.shown(schema)}, this version reads {SCHEMA}; finish with the version "
            "that wrote it, or remove the folder around it to start the training again"
        )
    if why is None and set(facts["files"]) != {PARAMETERS, OPTIMIZER}:
        why = f"{SEAL} lists {files.shown(sorted(facts['files']))}"
    if why is None and facts.get("step") != _step(path):
        why = f"{SEAL} is that of step {files.shown(facts.get('step'))}"
    if why is not None:
        _set_aside(path, why)
    return why is None


def _set_aside(path: Path, why: str) -> None:
    aside = path.with_name(ASIDE + path.name)
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    log.warning("checkpoint %s is damaged (%s): set aside as %s, taking the one before", path, why, aside.name)


def _held_out(path: Path) -> float | None:
    try:
        loss = _seal(path).get(HELD_OUT)
    except InputError:
        return None  # damaged: found and told when it is to be used
    return loss if isinstance(loss, float) else None


def _seal(path: Path) -> dict[str, Any]:
    return files.read_json(path / SEAL, "remove the folder to start again", durable.MANIFEST_BYTES)


def _step(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found
    return int(found[1])
