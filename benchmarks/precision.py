"""Do float16 with dynamic loss scaling, bfloat16 and float32 give the same loss curve? Pretrains a profile's base on
its own text in each, and float32 a second time on the rows in another order: what those two differ by is the noise.

    python benchmarks/precision.py --make-tokens FOLDER    # once, where the pipeline's packages are installed
    python benchmarks/precision.py --tokens FOLDER         # needs the core's packages alone

A 16-bit product on a CPU does not go through BLAS, so the full run belongs on a GPU; on a CPU take --profile demo and
few steps. Curves are moving means over --window steps; the first window, where the mean is not yet full, is left out.
The held-out loss at the end stands beside them.
"""

import argparse
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

os.environ.setdefault("MLX_ENABLE_TF32", "0")  # float32 means float32: MLX on CUDA multiplies in TF32 unless told

import numpy as np
from children import in_child

from magellano.errors import InputError
from magellano.names import Compute
from magellano.profile import Profile, load_profile
from magellano.progress import shown, silent

RUNS = (
    ("float32", Compute.FLOAT32, 0),
    ("float32, other order", Compute.FLOAT32, 1),
    ("float16", Compute.FLOAT16, 0),
    ("bfloat16", Compute.BFLOAT16, 0),
)
REFERENCE, OTHER = RUNS[0][0], RUNS[1][0]


def make_tokens(folder: Path, profile: Profile) -> None:
    """The profile's pretraining text as a tokens folder."""
    from magellano.stages import tokenize

    assert profile.pretrain is not None
    folder.mkdir(parents=True)
    facts = tokenize.run(folder, profile.pretrain.data, profile.model.vocab_size, silent)
    print(json.dumps({"rows": facts["rows"], "seq_len": facts["seq_len"], "vocab_size": facts["vocab_size"]}))


def train(profile: Profile, tokens: Path, name: str, compute: Compute, order: int) -> dict[str, Any]:
    """One run: the loss of each step, and the held-out loss after the last."""
    from magellano.backend import compute_dtype, describe
    from magellano.model import MagellanoLM, seeded
    from magellano.trainer import Trainer

    assert profile.pretrain is not None
    config = profile.pretrain.train.model_copy(update={"compute": compute, "seed": order})
    model = MagellanoLM(profile.model, seeded(profile.base.seed), compute_dtype(compute))
    trainer, taken = Trainer(model, config, tokens, profile.loss, profile.memory.limit_gib), []
    with shown(name) as progress:
        for step in range(config.steps):
            taken.append(trainer.one_step())
            progress(step + 1, config.steps, loss=taken[-1].loss, tokens_per_s=taken[-1].tokens_per_s)
    return {
        "losses": [m.loss for m in taken],
        "held_out_loss": trainer.held_out_loss(),
        "skipped": sum(m.skipped for m in taken),
        "loss_scale": trainer.scale.value,
        "peak_gib": taken[-1].peak_gib,
        "step_s": float(np.median([m.seconds for m in taken])),
        "machine": describe(),
    }


def smoothed(losses: list[float], window: int) -> np.ndarray:
    """Means over `window` steps in a row, [steps - window + 1]."""
    return np.convolve(losses, np.full(window, 1.0 / window), mode="valid")


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest distance of two curves, nats; infinite where either is not finite."""
    return float(np.abs(a - b).max()) if np.isfinite(a).all() and np.isfinite(b).all() else float("inf")


def compared(runs: dict[str, dict[str, Any]], window: int) -> dict[str, Any]:
    """Each run's largest distance to the float32 curve, and what float32 differs by from itself in another order."""
    curves = {name: smoothed(run["losses"], window) for name, run in runs.items()}
    noise = difference(curves[OTHER], curves[REFERENCE])
    apart = {name: difference(curve, curves[REFERENCE]) for name, curve in curves.items() if name != REFERENCE}
    return {"noise": noise, "largest_difference": apart, "within_noise": all(d <= noise for d in apart.values())}


def show(facts: dict[str, Any]) -> None:
    """The table for a person."""
    machine = facts["runs"][REFERENCE]["machine"]
    print(f"{facts['profile']}, {facts['steps']} steps of {facts['tokens_a_step']} tokens on {machine['device']}")
    print(f"{'run':22}{'first':>9}{'last':>9}{'held out':>10}{'largest difference':>20}{'skipped':>9}{'s a step':>10}")
    for name, run in facts["runs"].items():
        curve, apart = smoothed(run["losses"], facts["window"]), facts["largest_difference"].get(name)
        print(
            f"{name:22}{curve[0]:9.4f}{curve[-1]:9.4f}{run['held_out_loss']:10.4f}"
            f"{'-' if apart is None else f'{apart:.4f}':>20}{run['skipped']:9}{run['step_s']:10.3f}"
        )
    verdict = "all within" if facts["within_noise"] else "NOT all within"
    print(
        f"means over {facts['window']} steps; {verdict} the noise of {facts['noise']:.4f} nats (float32 in two orders)"
    )
    print(f"float16's loss scale at the end: {facts['runs']['float16']['loss_scale']:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="phase1")
    parser.add_argument("--make-tokens", type=Path, metavar="FOLDER")
    parser.add_argument("--tokens", type=Path, metavar="FOLDER")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=0, help="default: the profile's")
    parser.add_argument("--window", type=int, default=25, help="steps that are averaged")
    parser.add_argument("--together", action="store_true", help="all runs at once, for a GPU that has room for them")
    parser.add_argument("--out", type=Path, help="a JSON file for all curves")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    settings: dict[str, Any] = {"pretrain.train.steps": arguments.steps}
    if arguments.batch:
        settings["pretrain.train.batch"] = arguments.batch
    profile = load_profile(arguments.profile, {"pretrain.train.warmup": max(1, arguments.steps // 10), **settings})
    if arguments.make_tokens:
        return make_tokens(arguments.make_tokens, profile)
    if not arguments.tokens or not 1 <= arguments.window <= arguments.steps:
        raise InputError("precision: give --tokens FOLDER, as --make-tokens made it, and a --window within --steps")
    assert profile.pretrain is not None
    facts: dict[str, Any] = {"profile": profile.name, "steps": arguments.steps, "window": arguments.window, "runs": {}}
    facts["tokens_a_step"] = profile.pretrain.train.batch * profile.pretrain.data.seq_len
    with ThreadPoolExecutor(len(RUNS) if arguments.together else 1) as pool:
        found = pool.map(lambda run: in_child(train, profile, arguments.tokens, *run), RUNS)
        facts["runs"] = dict(zip([name for name, _, _ in RUNS], found, strict=True))
    facts |= compared(facts["runs"], arguments.window)
    if arguments.out:
        arguments.out.write_text(json.dumps(facts) + "\n", encoding="utf-8")
    print(json.dumps(facts)) if arguments.json else show(facts)
    if not facts["within_noise"]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
