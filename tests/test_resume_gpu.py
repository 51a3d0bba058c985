"""Whether a training that was killed or stopped ends in the bits of one that nothing disturbed, on the device at hand,
GPUs too: each training is a process of its own. What is found is told in a line a case (`pytest -s`).

On a CPU tests/test_resume.py goes much further; there this file only has its share.
"""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from magellano.backend import describe, on_gpu
from tests.resume_gpu_runner import SEQ_LEN, SHAPES
from tests.resume_runner import ADAPTER, outcome
from tests.training import make_tokens

ROOT = Path(__file__).resolve().parents[1]
RUN = {"steps": 12, "accumulate": 2, "checkpoint_every": 3}
COMPUTE = {
    "float32": {"compute": "float32"},
    "bfloat16": {"compute": "bfloat16", "state": "float16"},  # what `auto` is on a GPU
}
CASES = [(c, s) for c in COMPUTE for s in SHAPES] if on_gpu() else [("float32", "small")]
KILLED, STOPPED = ("SIGKILL", 5), ("SIGTERM", 7)  # after these steps; the checkpoint before is step 3's, or 7's own
DISTURBED = {"again": None, "killed": KILLED, "stopped": STOPPED}
CODES = {"killed": -9, "stopped": 75}
FROM = {"whole": 0, "again": 0, "killed": 3, "stopped": 7}


@dataclass(frozen=True)
class Training:
    """A training and the exit codes of the processes that it took."""

    work: Path
    codes: list[int]
    errors: str

    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.work / "facts.json").read_text())
        return facts

    def losses(self) -> dict[int, float]:
        lines = map(json.loads, (self.work / "metrics.jsonl").read_text().splitlines())
        return {line["step"]: line["loss"] for line in lines if "loss" in line}


def trained(folder: Path, compute: str, shape: str, what: str) -> Training:
    """In one process, or where it is disturbed in two."""
    work, end = folder / f"{compute}-{shape}-{what}", DISTURBED.get(what)
    # What MLX compiles on CUDA it leaves on disk, not whole at once, so that none may read what another one writes.
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path, "MLX_PTX_CACHE_DIR": str(folder / "ptx" / work.name)}
    environment.pop("MLX_ENABLE_TF32", None)  # as users have it
    config = json.dumps(RUN | COMPUTE[compute])
    command = [sys.executable, str(Path(__file__).with_name("resume_gpu_runner.py")), str(work)]
    command += [str(folder / shape), shape, config]
    codes, errors = [], ""
    for more in [[]] if end is None else [[end[0], str(end[1])], []]:
        done = subprocess.run([*command, *more], capture_output=True, text=True, env=environment, timeout=400)
        codes.append(done.returncode)
        errors += done.stderr
    return Training(work, codes, errors)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Training]:
    """All trainings, side by side: on CUDA each compiles for up to a minute."""
    folder = tmp_path_factory.mktemp("resume-gpu")
    for shape in {shape for _, shape in CASES}:
        make_tokens(folder / shape, SEQ_LEN[shape], SHAPES[shape].vocab_size)
    asked = [(compute, shape, what) for compute, shape in CASES for what in ("whole", *DISTURBED)]
    with ThreadPoolExecutor(min(len(asked), os.cpu_count() or 1)) as pool:
        made = list(pool.map(lambda each: trained(folder, *each), asked))
    return dict(zip(asked, made, strict=True))


def apart(one: Training, other: Training) -> str:
    """How far apart two trainings ended, and where their ways parted."""
    a, b = (load_file(training.work / ADAPTER) for training in (one, other))
    assert a.keys() == b.keys()
    far = {name: float(np.abs(a[name] - b[name]).max() / max(np.abs(a[name]).max(), 1e-30)) for name in a}
    worst = max(far, key=far.__getitem__)
    losses, others = one.losses(), other.losses()
    steps = [step for step in losses if losses[step] != others.get(step)]
    parted = f"losses differ from step {min(steps)} on" if steps else "no loss differs"
    rooms = "like" if one.facts()["loads"] == other.facts()["loads"] else "other"
    return (
        f"{sum(value > 0 for value in far.values())} of {len(far)} tensors differ, by {far[worst]:.2g} of the largest "
        f"value at most, in {worst}; {parted}; the experts' rooms are for {rooms} loads"
    )


@pytest.mark.parametrize("what", DISTURBED)
@pytest.mark.parametrize(("compute", "shape"), CASES)
def test_a_disturbed_training_ends_in_the_same_bits(
    found: dict[tuple[str, str, str], Training], compute: str, shape: str, what: str
) -> None:
    whole, other = found[compute, shape, "whole"], found[compute, shape, what]
    assert whole.codes == [0], whole.errors
    assert other.codes == [*([CODES[what]] if what in CODES else []), 0], other.errors
    ends = {name: outcome(training.work) for name, training in (("whole", whole), (what, other))}
    same = {key: ends["whole"][key] == ends[what][key] for key in ("adapter", "metrics")}
    how = "yes" if all(same.values()) else f"no: {apart(whole, other)}"
    print(f"\n{describe()['backend']} {compute} {shape}: {what} = whole: {how}")
    for name, training in (("whole", whole), (what, other)):
        facts = training.facts()
        assert facts["resumed_from"] == FROM[name]
        assert (facts["steps"], facts["skipped"], facts["rollbacks"]) == (RUN["steps"], 0, [])
        assert ends[name]["left"] == []
    assert len(set(whole.losses().values())) == RUN["steps"], "it trains"
    assert same == {"adapter": True, "metrics": True}, how
