"""The same training in PyTorch and here, on the same CPU cores in one run: same shapes, tokens, initial weights, AdamW,
schedule and clipping.

    pip install torch==2.13.0        # into an environment that has this project's packages; it is no dependency
    python benchmarks/torch_cpu.py --profile demo --what pretrain

`pretrain` trains all parameters. `fine-tune` trains LoRA adapters on a frozen base: ours from NF4, PyTorch's from the
same values made dense float32 beforehand, which is to its advantage. PyTorch keeps all activations; ours makes each
layer's again in the backward pass where `train.recompute` says so. Each run is a process of its own, ours and
PyTorch's in turn, so that noise hits both. The losses must agree: that shows that it is the same model.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from children import in_child
from safetensors.numpy import load_file, save_file

from magellano.data.shards import Batch, Shards, indices
from magellano.errors import InputError
from magellano.names import BaseSource
from magellano.profile import Profile, TrainConfig, load_profile, parse_override
from magellano.progress import silent

WEIGHTS, RATES = "weights.safetensors", "rates.json"
PHASE1_BATCH = 2  # of the profile's 8: a step of 77 M parameters on two cores is slow
TOLERANCE = 1e-3  # of the losses, nats
SHOWN = 5  # steps whose losses are printed


def settings(profile: Profile, what: str) -> TrainConfig:
    """What the run trains by."""
    if what == "fine-tune":
        return profile.train
    assert profile.pretrain is not None
    return profile.pretrain.train


def prepare(root: Path, profile: Profile, what: str) -> dict[str, Any]:
    """Tokens, the learning rates, our base and adapter, and all initial values as dense float32 for PyTorch."""
    from magellano import loader
    from magellano.backend import mx
    from magellano.init import initial
    from magellano.layout import parameters
    from magellano.optimizer import cosine_with_warmup
    from magellano.stages import attach_lora, quantize, tokenize

    for name in ("tokens", "base", "adapter"):
        (root / name).mkdir()
    c, tuned = settings(profile, what), what == "fine-tune"
    data = profile.data if tuned or profile.pretrain is None else profile.pretrain.data
    tokenize.run(root / "tokens", data, profile.model.vocab_size, silent)
    rates = [cosine_with_warmup(step, c.lr, c.warmup, c.steps, c.min_lr_ratio) for step in range(c.steps)]
    (root / RATES).write_text(json.dumps(rates), encoding="utf-8")
    if not tuned:
        dense = {spec.name: initial(spec, profile.base.seed) for spec in parameters(profile.model)}
    else:
        from magellano import lora

        seeded = profile.model_copy(update={"base": profile.base.model_copy(update={"source": BaseSource.SEEDED})})
        quantize.run(root / "base", seeded, None, silent)
        attach_lora.run(root / "adapter", profile, root / "base")
        files = loader.Files(root / "base")
        dense = {spec.name: _dense(files(spec)) for spec in parameters(profile.model)}
        dense |= lora.load(root / "adapter", profile.model)[1]
    mx.eval(dense)
    save_file({name: np.ascontiguousarray(value) for name, value in dense.items()}, root / WEIGHTS)
    return {"tensors": len(dense)}


def _dense(weight: Any) -> Any:
    from magellano.backend import mx

    return weight if isinstance(weight, mx.array) else weight.dequantize()


def ours(root: Path, profile: Profile, what: str, steps: int) -> dict[str, Any]:
    """Steps of our trainer."""
    from magellano import loader
    from magellano.backend import compute_dtype
    from magellano.model import MagellanoLM, seeded
    from magellano.trainer import Trainer

    config = settings(profile, what)
    if what == "fine-tune":
        model = loader.load_release(root / "adapter", root / "base", config.compute)
    else:
        model = MagellanoLM(profile.model, seeded(profile.base.seed), compute_dtype(config.compute))
    trainer = Trainer(model, config, root / "tokens", profile.loss, profile.memory.limit_gib)
    taken = [trainer.one_step() for _ in range(steps)]
    return {"losses": [m.loss for m in taken], "steps_s": [m.seconds for m in taken], "form": _form(trainer)}


def _form(trainer: Any) -> str:
    return "activations kept" if trainer.backprop.keeps else "layers recomputed"


def torchs(root: Path, profile: Profile, what: str, steps: int) -> dict[str, Any]:
    """The same steps in PyTorch."""
    import torch
    from torch_model import Model, faster_scan

    torch.set_num_threads(_cores())
    c, tuned, tokens = settings(profile, what), what == "fine-tune", Shards(root / "tokens", "train")
    tensors = _parameters(load_file(root / WEIGHTS), tuned)
    scan = faster_scan(profile.model, c.batch, tokens.seq_len)
    lora_scale = profile.lora.alpha / profile.lora.rank if tuned else 0.0
    model = Model(profile.model, tensors, scan, lora_scale)
    optimizer = _optimizer(profile, c, tensors)
    rates, losses, seconds = json.loads((root / RATES).read_text(encoding="utf-8")), [], []
    for step in range(steps):
        started = time.perf_counter()
        rows = tokens.batch(indices(step * c.batch, c.batch, tokens.rows, c.seed))
        losses.append(_torch_step(model, optimizer, rows, rates[step], c, tuned))
        seconds.append(time.perf_counter() - started)
    return {"losses": losses, "steps_s": seconds, "form": scan.__name__}


def _torch_step(model: Any, optimizer: Any, rows: Batch, rate: float, c: TrainConfig, tuned: bool) -> float:
    """One step; returns the loss in nats a target token."""
    import torch

    total = max(float(rows.weights.sum()), 1.0)
    tokens, targets, weights, reset = (
        torch.from_numpy(a)
        for a in (rows.tokens.astype(np.int64), rows.targets.astype(np.int64), rows.weights, rows.reset)
    )
    nll, balance, z = model.loss(tokens, targets, weights, reset)
    objective = nll / total if tuned else nll / total + c.balance_loss * balance + c.router_z_loss * z
    optimizer.zero_grad(set_to_none=True)
    objective.backward()
    torch.nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], c.clip_norm)
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.step()
    return float(nll.detach()) / total


def _parameters(arrays: dict[str, np.ndarray], tuned: bool) -> dict[str, Any]:
    """Tensors by name, stacks of experts one by one; those that train ask for gradients."""
    import torch

    found = {}
    for name, array in arrays.items():
        trains, value = not tuned or ".lora_" in name, torch.from_numpy(array)
        pieces = value.unbind(0) if ".experts." in name else None
        named = {name: value} if pieces is None else {f"{name}.{e}": w.clone() for e, w in enumerate(pieces)}
        found |= {n: v.requires_grad_(trains) for n, v in named.items()}
    return found


def _optimizer(profile: Profile, c: TrainConfig, tensors: dict[str, Any]) -> Any:
    import torch

    from magellano.layout import parameters

    decaying = {spec.name for spec in parameters(profile.model) if spec.decays}
    groups: dict[bool, list[Any]] = {True: [], False: []}
    for name, value in tensors.items():
        stem = name.rsplit(".", 1)[0] if name.rsplit(".", 1)[1].isdigit() else name
        if value.requires_grad:
            groups[stem in decaying or ".lora_" in stem].append(value)
    return torch.optim.AdamW(
        [{"params": p, "weight_decay": c.weight_decay if decays else 0.0} for decays, p in groups.items() if p],
        lr=c.lr, betas=(c.beta1, c.beta2), eps=c.eps, fused=True,
    )  # fmt: skip


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def compared(profile: Profile, what: str, steps: int, rounds: int) -> dict[str, Any]:
    """Runs both in turn and puts their figures side by side. InputError where the losses part."""
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "torch": []}
    with tempfile.TemporaryDirectory() as folder:
        in_child(prepare, Path(folder), profile, what)
        for _ in range(rounds):
            for name, work in (("ours", ours), ("torch", torchs)):
                found[name].append(in_child(work, Path(folder), profile, what, steps))
    c = settings(profile, what)
    tokens = c.batch * (profile.data if what == "fine-tune" or not profile.pretrain else profile.pretrain.data).seq_len
    facts: dict[str, Any] = {"profile": profile.name, "what": what, "batch": c.batch, "tokens_a_step": tokens}
    facts |= {"cores": _cores(), "steps": steps, "rounds": rounds}
    for name, runs in found.items():
        step_s = [statistics.median(run["steps_s"][1:]) for run in runs]  # the first one compiles and allocates
        facts[name] = {
            "step_s": min(step_s),
            "step_s_by_round": step_s,
            "fastest_step_s": min(min(run["steps_s"][1:]) for run in runs),
            "tokens_per_s": tokens / min(step_s),
            "resident_gb": max(run["resident_gb"] for run in runs),
            "losses": runs[0]["losses"],
            "form": runs[0]["form"],
        }
    facts["ratio"] = facts["torch"]["step_s"] / facts["ours"]["step_s"]
    facts["ratio_of_fastest_steps"] = facts["torch"]["fastest_step_s"] / facts["ours"]["fastest_step_s"]
    pairs = zip(facts["ours"]["losses"][:SHOWN], facts["torch"]["losses"][:SHOWN], strict=True)
    facts["largest_difference"] = max(abs(a - b) for a, b in pairs)
    return facts


def show(facts: dict[str, Any]) -> None:
    """The table for a person."""
    head = f"{facts['profile']}, {facts['what']}: batch {facts['batch']}, {facts['tokens_a_step']} tokens a step"
    print(f"{head}, {facts['cores']} cores, medians of {facts['steps'] - 1} steps, best of {facts['rounds']} rounds")
    for name in ("ours", "torch"):
        f = facts[name]
        rounds = ", ".join(f"{s:.3f}" for s in f["step_s_by_round"])
        speed = (
            f"{f['tokens_per_s']:8,.0f} tokens/s  {1 / f['step_s']:7.3f} steps/s  {f['resident_gb']:5.2f} GB resident"
        )
        print(f"  {name:6} {speed}  (s a step: {rounds}; fastest {f['fastest_step_s']:.3f})  {f['form']}")
        print(f"         losses {' '.join(f'{loss:.5f}' for loss in f['losses'][:SHOWN])}")
    print(f"  ours over torch {facts['ratio']:.2f}, by the fastest steps {facts['ratio_of_fastest_steps']:.2f}")
    print(f"  losses differ by at most {facts['largest_difference']:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", choices=("demo", "phase1"), default="demo")
    parser.add_argument("--what", choices=("pretrain", "fine-tune"), default="pretrain")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch", type=int, default=0, help=f"default: the profile's; for phase1 {PHASE1_BATCH}")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as magellano train's")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.steps < 2:
        raise InputError(f"--steps {arguments.steps}: at least 2, for the first is not timed")
    batch = arguments.batch or (PHASE1_BATCH if arguments.profile == "phase1" else 0)
    section = "train" if arguments.what == "fine-tune" else "pretrain.train"
    overrides = {f"{section}.batch": batch} if batch else {}
    profile = load_profile(arguments.profile, {**overrides, **dict(map(parse_override, arguments.set))})
    facts = compared(profile, arguments.what, arguments.steps, arguments.rounds)
    print(json.dumps(facts)) if arguments.json else show(facts)
    if facts["largest_difference"] > TOLERANCE:
        raise SystemExit(
            f"the losses differ by {facts['largest_difference']:.1e}, more than {TOLERANCE:g}: not the same model"
        )


if __name__ == "__main__":
    main()
