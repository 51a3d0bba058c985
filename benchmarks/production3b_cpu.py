"""production3b on a CPU: `python benchmarks/production3b_cpu.py FOLDER [--tokens 32]` quantises its seeded initial
weights, attaches the adapter and takes one training step of batch 1, and prints time and peak memory of each process.

FOLDER keeps the 1.6 GB base between calls. Nothing here is shortened: what runs are the stages themselves.
"""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from children import in_child

from magellano.profile import Profile, load_profile
from magellano.progress import silent


def quantize(root: Path, profile: Profile) -> dict[str, Any]:
    """Seeded initial weights to the NF4 base, streamed."""
    from magellano.stages import quantize as stage

    return stage.run(fresh(root / "quantize" / "base"), profile, None, silent)


def one_step(root: Path, profile: Profile) -> dict[str, Any]:
    """One step on the profile's own data; tokens and adapter are made first."""
    from magellano import loader
    from magellano.stages import attach_lora, tokenize
    from magellano.trainer import Trainer

    tokens, adapter = fresh(root / "tokenize" / "tokens"), fresh(root / "attach_lora" / "adapter")
    tokenize.run(tokens, profile.data, profile.model.vocab_size, silent)
    attach_lora.run(adapter, profile, root / "quantize" / "base")
    model = loader.load_release(adapter, root / "quantize" / "base", profile.train.compute)
    metrics = Trainer(model, profile.train, tokens, profile.loss, profile.memory.limit_gib).one_step()
    return {"loss": metrics.loss, "peak_gib": metrics.peak_gib, "step_s": metrics.seconds}


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()
    settings = {"data.seq_len": arguments.tokens, "train.steps": 1, "train.batch": 1, "train.warmup": 0}
    profile, root = load_profile("production3b", settings), arguments.folder
    todo = [one_step] if (root / "quantize" / "base" / "config.json").is_file() else [quantize, one_step]
    for work in todo:
        print(json.dumps({"part": work.__name__, **in_child(work, root, profile)}), flush=True)


if __name__ == "__main__":
    main()
