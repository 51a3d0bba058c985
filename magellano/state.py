"""Checkpoints of a running training: parameters, optimiser, loss scale and position, sealed; ordered by step, never by
clock.
"""

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magellano import durable, files
from magellano.backend import mx
from magellano.errors import InputError
from magellano.tensors import load_file

log = logging.getLogger(__name__)

SCHEMA = 1
SEAL, PARAMETERS, OPTIMIZER = "checkpoint.json", "parameters.safetensors", "optimizer.safetensors"
KEPT = 2  # verified checkpoints that stay
PREFIX, ASIDE = "step-", ".damaged-"


@dataclass(frozen=True)
class Found:
    """A checkpoint that was verified and read."""

    parameters: dict[str, mx.array]
    optimizer: dict[str, mx.array]
    facts: dict[str, Any]


def save(
    folder: Path, step: int, parameters: dict[str, mx.array], optimizer: dict[str, mx.array], facts: dict[str, Any]
) -> None:
    """Write folder/step-N whole or not at all, then drop all but the last two."""
    durable.private_folder(folder)
    final = folder / f"{PREFIX}{step:09d}"
    temporary = folder / f"{durable.TEMPORARY}{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    durable.private_folder(temporary)
    try:
        mx.save_safetensors(str(temporary / PARAMETERS), parameters)
        mx.save_safetensors(str(temporary / OPTIMIZER), optimizer)
        durable.seal(temporary, SEAL, {"schema": SCHEMA, **facts})
        durable.publish(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for old in _by_step(folder)[:-KEPT]:
        shutil.rmtree(old)


def latest(folder: Path) -> Found | None:
    """The newest checkpoint whose sizes and SHA-256 hold, or None; damaged ones are set aside with a warning."""
    for path in reversed(_by_step(folder)):
        if why := durable.damage(path, SEAL):
            aside = path.with_name(ASIDE + path.name)
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)
            log.warning("checkpoint %s is damaged (%s): set aside as %s, taking the one before", path, why, aside.name)
            continue
        facts = files.read_json(path / SEAL, "remove the folder to start again", durable.MANIFEST_BYTES)
        if (found := facts.get("schema")) != SCHEMA:
            raise InputError(
                f"{path}: checkpoint schema {found}, this version reads {SCHEMA}; finish with the version that wrote it"
            )
        parameters, optimizer = load_file(path / PARAMETERS), load_file(path / OPTIMIZER)
        mx.eval(parameters, optimizer)  # mx.load is lazy
        return Found(parameters, optimizer, facts)
    return None


def _by_step(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{PREFIX}*")) if folder.is_dir() else []
