"""Makes tests/golden/checkpoint/: what a training leaves after 9 of 14 steps in float16, with 16-bit states, a loss
scale that has overflowed, batches that were passed over, and a held-out loss; and checkpoint.json beside it, what is in
it, read by other means.

Run it from a checkout whose checkpoints are to be readable from now on: `python -m tests.golden.make_checkpoint`.
"""

import contextlib
import hashlib
import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from magellano import trainer as trainer_module
from magellano.backprop import Backprop, Outcome
from magellano.errors import Stopped
from magellano.profile import TrainConfig
from magellano.trainer import run_to_end
from tests.training import CONFIG, adapter_trainer, make_tokens

GOLDEN = Path(__file__).parent / "checkpoint"
STEPS, AT = 14, 9
SCALE = 2.0**18
SETTINGS = {
    "steps": STEPS, "accumulate": 2, "compute": "float16", "state": "float16",
    "checkpoint_every": 1, "evaluate_every": 1,
}  # fmt: skip
POISON = (4, 5, 6)  # steps whose loss is not a number


def config() -> TrainConfig:
    return TrainConfig(**(CONFIG.model_dump() | SETTINGS))


def contents(folder: Path) -> dict[str, object]:
    """Every tensor's type, shape and SHA-256, by the safetensors package alone, and the facts."""
    told: dict[str, object] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            for name in sorted(tensors.keys()):
                value = tensors.get_tensor(name)
                told[f"{file.stem}/{name}"] = [
                    str(value.dtype),
                    list(value.shape),
                    hashlib.sha256(value.tobytes()).hexdigest(),
                ]
    facts = json.loads((folder / "checkpoint.json").read_text())
    return {"tensors": told, "facts": {k: v for k, v in facts.items() if k not in ("files", "seal")}}


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        trainer_module.SCALE_START = SCALE
        trainer = adapter_trainer(make_tokens(Path(name) / "tokens"), config())

        class Poisoned(Backprop):
            def __call__(self, *args: Any) -> Outcome:
                found = super().__call__(*args)
                nll = found.nll * float("nan") if trainer.step + 1 in POISON else found.nll
                return replace(found, nll=nll)

        trainer.backprop.__class__ = Poisoned

        def progress(done: int, total: int, **facts: float | str) -> None:
            if done == AT + 1:
                raise Stopped

        with contextlib.suppress(Stopped):
            run_to_end(trainer, Path(name) / "work", progress)
        shutil.rmtree(GOLDEN, ignore_errors=True)
        made = Path(name) / "work" / f"step-{AT:09d}"
        shutil.copytree(made, GOLDEN / made.name)
        text = json.dumps(contents(made), indent=1, sort_keys=True)
        (GOLDEN.parent / "checkpoint.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
