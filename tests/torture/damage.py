"""Truncated files and flipped bits in checkpoints and artifacts: each is found, and nothing is taken from them."""

import os
import random
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path

from magellano import durable, state
from magellano.artifacts import MANIFEST, Store
from magellano.names import Stage
from tests.torture import rig
from tests.torture.outcome import Row, Share

FLIPS = 10_000
THROUGH = 100  # every so many flips go all the way: set aside, and the one before taken or built again
Sealed = tuple[Path, str]  # a folder and its seal's name


def part(share: Share) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as name:
        folder, marks = Path(name), rig.Marks()
        rig.uninterrupted(folder, marks)
        home, checkpoints = folder / "whole", folder / "checkpoints"
        sealed: list[Sealed] = [(p, MANIFEST) for p in sorted(home.glob("artifacts/*/[!.]*"))]
        marks.clear()
        assert rig.wait(rig.fork(lambda: _checkpoints(home, checkpoints), marks)) == 0, marks.words
        sealed += [(p, state.SEAL) for p in sorted(checkpoints.iterdir())[-1:]]
        yield truncated(sealed)
        yield flipped("bits flipped in checkpoints", sealed[-1:], share.of(FLIPS // 2, 400), share.seed, marks)
        yield flipped("bits flipped in artifacts", sealed[:-1], share.of(FLIPS // 2, 400), share.seed, marks)


def _checkpoints(home: Path, folder: Path) -> str:
    """Two checkpoints of the adapter that the run in `home` trained, as the trainer saves them."""
    from magellano.tensors import load_file
    from magellano.trainer import LossScale

    trained = next(home.glob("artifacts/train/[!.]*"))
    tensors, optimizer = load_file(trained / rig.ADAPTER), load_file(trained / "optimizer.safetensors")
    for step in (1, 2):
        facts = {"step": step, "tokens": 123, "loss_scale": vars(LossScale())}
        state.save(folder, step, tensors, optimizer, facts)
    return "saved"


def places(path: Path) -> dict[str, int]:
    """The sizes to cut a file to."""
    size = path.stat().st_size
    found = {"0": 0, "1": 1, "half": size // 2, "-1": size - 1}
    if path.suffix == ".safetensors":
        header = 8 + struct.unpack("<Q", path.read_bytes()[:8])[0]
        found |= {"header": header, "half the header": header // 2, "length": 8}
    return {name: cut for name, cut in found.items() if 0 <= cut < size}


def truncated(sealed: list[Sealed]) -> Row:
    """Every file of every folder, seals too, cut at each place; and gone."""
    row = Row("truncated at 0, 1, header, half, -1; removed", "durable.damage on 9 artifacts and a checkpoint")
    files = 0
    for folder, seal in sealed:
        for path in durable.files_of(folder):
            data, files = path.read_bytes(), files + 1
            for where, cut in places(path).items():
                os.truncate(path, cut)
                row.tries += 1
                row.check(durable.damage(folder, seal), f"{folder.parent.name} {path.name} cut at {where}: not found")
                path.write_bytes(data)
            path.unlink()
            row.tries += 1
            row.check(durable.damage(folder, seal), f"{folder.parent.name} {path.name} removed: not found")
            path.write_bytes(data)
        row.check(durable.damage(folder, seal) is None, f"{folder.name}: unsound though it is as it was")
    row.note = f"{files} files"
    return row


def flipped(fault: str, sealed: list[Sealed], flips: int, seed: int, marks: rig.Marks) -> Row:
    """One bit of one file: the file by chance, then the bit."""
    row = Row(fault, "durable.damage; every 100th through state.latest or Store.find")
    rng, in_seal = random.Random(seed), 0
    files = [(folder, seal, path) for folder, seal in sealed for path in durable.files_of(folder)]
    files = [(folder, seal, path) for folder, seal, path in files if path.stat().st_size]
    for number in range(flips):
        folder, seal, path = rng.choice(files)
        at, bit = rng.randrange(path.stat().st_size), 1 << rng.randrange(8)
        with open(path, "r+b") as f:
            before = os.pread(f.fileno(), 1, at)
            os.pwrite(f.fileno(), bytes([before[0] ^ bit]), at)
            row.tries += 1
            in_seal += path.name == seal
            what = f"{folder.parent.name}/{path.name} byte {at} {before!r} to {bytes([before[0] ^ bit])!r}"
            found = row.check(durable.damage(folder, seal), f"{what}: not found")
            if found and number % THROUGH == 0:
                row.check(*_through(folder, seal, marks, what))
            os.pwrite(f.fileno(), before, at)
    row.note = f"{in_seal:,} of them in the seals"
    return row


def _through(folder: Path, seal: str, marks: rig.Marks, what: str) -> tuple[bool, str]:
    """What a reader of a copy makes of it."""
    with tempfile.TemporaryDirectory() as name:

        def latest() -> str:
            shutil.copytree(folder.parent, Path(name, "work"))
            found = state.latest(Path(name, "work"))
            return "refused" if found and found.facts["step"] == 1 else f"{found and found.facts['step']} taken"

        def find() -> str:
            copy = Path(name, "artifacts", folder.parent.name, folder.name)
            shutil.copytree(folder, copy)
            return "refused" if Store(Path(name)).find(Stage(folder.parent.name), folder.name) is None else "taken"

        marks.clear()
        status = rig.wait(rig.fork(latest if seal == state.SEAL else find, marks))
    return status == 0 and marks.words == "refused", f"{what}: {status} {marks.words[:300]}"
