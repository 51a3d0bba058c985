"""Ours against what else one would run on a CPU: `python benchmarks/cpu_peers.py [--only scan] [--json]`.

The peers are not in the lock. In an environment of its own, so that the project's stays as it is:

    python3 -m venv /tmp/peers
    /tmp/peers/bin/pip install --no-deps --require-hashes -r requirements.lock
    /tmp/peers/bin/pip install torch==2.13.0 && /tmp/peers/bin/pip install --no-deps bitsandbytes==0.50.2
    PYTHONPATH=. /tmp/peers/bin/python benchmarks/cpu_peers.py

(`pip install -e .[peers]` takes both from the ranges in pyproject.toml instead; of torch take a CPU build.)

Each side of each comparison is a process of its own, so that two OpenMP runtimes do not meet in one. Both are given the
same numbers, take turns, so that what else the machine does hits both, and must come to the same result. Times are the
best of several turns after a first that is not counted. Memory is how far the resident size rises in that first run
above what it is with the inputs made (Linux only). The peer's loop over time is the fastest of those tried: exp(dt A)
and dt b x for all steps at once, unbound, then one multiply-add and one product a step; exp inside the loop takes three
times as long, one product for all steps at the end twice to three times.
"""

import argparse
import ctypes
import gc
import importlib
import importlib.util
import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

Work = Callable[[], float]  # does the work once; a number that tells whether the result is right
PAUSE_S = 0.05  # between turns: idle threads of the other side spin for a while


@dataclass(frozen=True)
class Case:
    """One comparison: what each side runs, how often, and the goal for the ratio of times, or for our memory in MB."""

    what: str
    peer: str
    ours: Callable[[], Work]
    theirs: Callable[[], Work]
    turns: int
    ratio: float | None = None
    extra_mb: float | None = None
    tolerance: float = 1e-3  # between the two results, relative


def mlx() -> Any:
    from magellano.backend import mx

    return mx


def torch() -> Any:
    found = importlib.import_module("torch")
    found.set_num_threads(os.cpu_count() or 1)
    return found


def normal(*shape: int, seed: int, scale: float = 1.0) -> np.ndarray:
    a = np.random.default_rng(seed).standard_normal(shape, np.float32)
    a *= np.float32(scale)
    return a


# Selective scan, forward and backward; B 4, T 512, I 1024, N 16, float32.


def scan_inputs() -> tuple[list[np.ndarray], np.ndarray]:
    """x, dt, A, b, c, and the cotangent of y."""
    B, T, I, N = 4, 512, 1024, 16
    dt = np.log1p(np.exp(normal(B, T, I, seed=1, scale=0.5) - 4))
    A = -np.ones((I, 1), np.float32) * np.arange(1, N + 1, dtype=np.float32)
    given = [normal(B, T, I, seed=0), dt, A, normal(B, T, N, seed=2), normal(B, T, N, seed=3)]
    return given, normal(B, T, I, seed=4)


def scan_ours() -> Work:
    mx = mlx()
    from magellano.ops import selective_scan

    given, dy = scan_inputs()
    arrays, cotangent = [mx.array(a) for a in given], mx.array(dy)

    def work() -> float:
        (y,), grads = mx.vjp(lambda *a: [selective_scan(*a)], arrays, [cotangent])
        mx.eval(y, grads)
        return sum(float(np.abs(np.array(a)).mean()) for a in (y, *grads))

    return work


def scan_theirs() -> Work:
    t = torch()
    given, dy = scan_inputs()
    x, dt, A, b, c = arrays = [t.from_numpy(a).requires_grad_() for a in given]

    def work() -> float:
        decay = t.exp(dt[..., None] * A).unbind(1)
        inputs = ((dt * x)[..., None] * b[:, :, None]).unbind(1)
        state, made = t.zeros(decay[0].shape), []
        for decay_t, input_t, c_t in zip(decay, inputs, c.unbind(1), strict=True):
            state = decay_t * state + input_t
            made.append((state @ c_t[..., None])[..., 0])
        y = t.stack(made, 1)
        grads = t.autograd.grad(y, arrays, t.from_numpy(dy))
        return sum(float(a.detach().abs().mean()) for a in (y, *grads))

    return work


# NF4 with double quantisation to float32; 4096 x 2048.


def nf4_ours() -> Work:
    mx = mlx()
    from magellano import nf4

    q = nf4.quantize(mx.array(normal(4096, 2048, seed=0)))
    mx.eval(*q.arrays().values())

    def work() -> float:
        w = q.dequantize(mx.float32)
        mx.eval(w)
        return float(np.array(w, copy=False)[0, :64].sum())

    return work


def nf4_theirs() -> Work:
    t, functional = torch(), importlib.import_module("bitsandbytes.functional")
    w = t.from_numpy(normal(4096, 2048, seed=0))
    codes, state = functional.quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4")
    return lambda: float(functional.dequantize_4bit(codes, state)[0, :64].sum())


# AdamW, a step of a tensor of 4096 x 4096 float32.


def adamw(make: Callable[[], Any], evaluate: Callable[[Any, Any], None]) -> Work:
    mx = mlx()
    optimizer, w = make(), {"w": mx.array(normal(4096, 4096, seed=0))}
    grads = {"w": mx.array(normal(4096, 4096, seed=1, scale=1e-3))}
    optimizer.init(w)
    evaluate(optimizer, [w, grads])
    held = {"w": w, "before": float(np.array(w["w"], copy=False)[0, 0])}

    def work() -> float:
        held["w"] = optimizer.apply_gradients(grads, held["w"])
        evaluate(optimizer, held["w"])
        return float(np.array(held["w"]["w"], copy=False)[0, 0]) - held["before"]

    return work


def adamw_ours(state: str) -> Work:
    mlx()
    from magellano.names import StateDtype
    from magellano.optimizer import AdamW

    return adamw(lambda: AdamW(1e-3, state=StateDtype(state)), lambda optimizer, arrays: optimizer.evaluate(arrays))


def adamw_float32() -> Work:
    return adamw_ours("float32")


def adamw_float16() -> Work:
    return adamw_ours("float16")


def adamw_theirs() -> Work:
    mx = mlx()
    optimizers = importlib.import_module("mlx.optimizers")  # magellano.backend has prepared the process
    return adamw(
        lambda: optimizers.AdamW(1e-3, bias_correction=True), lambda optimizer, arrays: mx.eval(arrays, optimizer.state)
    )


# Linear + cross-entropy and the gradient in x; 2048 rows, D 2048, V 50,257, the head frozen, float32.


def loss_inputs() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rows, D, V = 2048, 2048, 50257
    return normal(rows, D, seed=0), normal(V, D, seed=1, scale=0.02), np.random.default_rng(2).integers(0, V, rows)


def loss_ours() -> Work:
    mx = mlx()
    from magellano.ops import linear_cross_entropy

    x, w, target = (mx.array(a) for a in loss_inputs())
    weight = mx.ones(target.shape)
    mx.eval(x, w, target, weight)

    def work() -> float:
        loss, dx = mx.value_and_grad(lambda x: linear_cross_entropy(x, w, target, weight, frozen=True))(x)
        mx.eval(loss, dx)
        return loss.item() + float(np.abs(np.array(dx, copy=False)).sum())

    return work


def loss_theirs() -> Work:
    t = torch()
    x, w, target = (t.from_numpy(a) for a in loss_inputs())
    x.requires_grad_()

    def work() -> float:
        loss = t.nn.functional.cross_entropy(x @ w.T, target, reduction="sum")
        (dx,) = t.autograd.grad(loss, x)
        return float(loss.detach()) + float(dx.abs().sum())

    return work


CASES = {
    "scan": Case("scan, forward + backward", "torch, loop", scan_ours, scan_theirs, 10, ratio=15),
    "nf4": Case("NF4 to float32", "bitsandbytes", nf4_ours, nf4_theirs, 60, ratio=3),
    "adamw": Case("AdamW, float32 states", "mlx.optimizers", adamw_float32, adamw_theirs, 30, ratio=5),
    "adamw16": Case("AdamW, float16 states", "mlx.optimizers", adamw_float16, adamw_theirs, 30, ratio=5),
    "loss": Case("linear + cross-entropy", "torch, all logits", loss_ours, loss_theirs, 3, extra_mb=250),
}


def resident(key: str) -> float:
    """VmRSS (now) or VmHWM (the most so far) in MB; NaN where there is no /proc."""
    status = Path("/proc/self/status")
    found = re.search(rf"{key}:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) / 1e3 if found else float("nan")


def extra_mb(work: Work) -> float:
    """How far `work` raises the resident size, after what was freed before has gone back to the system."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forgets the most so far
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def side(make: Callable[[], Work], pipe: Connection) -> None:
    """One side's process: makes the inputs, measures memory, then takes a turn for each message."""
    work = make()
    pipe.send(extra_mb(work))
    while pipe.recv():
        started = time.perf_counter()
        result = work()
        pipe.send((time.perf_counter() - started, result))


def compare(case: Case) -> dict[str, Any]:
    """Both sides in turn; times in ms, memory in MB."""
    spawn, pipes, processes, extra = multiprocessing.get_context("spawn"), [], [], []
    for make in (case.ours, case.theirs):
        mine, other = spawn.Pipe()
        processes.append(spawn.Process(target=side, args=(make, other), daemon=True))
        processes[-1].start()
        other.close()  # so that a dead child is an EOFError here
        pipes.append(mine)
        extra.append(mine.recv())
    best, results = [float("inf")] * 2, [0.0] * 2
    for _ in range(case.turns):
        for i, pipe in enumerate(pipes):
            time.sleep(PAUSE_S)
            pipe.send(True)
            seconds, results[i] = pipe.recv()
            best[i] = min(best[i], seconds)
    for pipe, process in zip(pipes, processes, strict=True):
        pipe.send(False)
        process.join()
    if abs(results[0] - results[1]) > case.tolerance * abs(results[1]):
        raise SystemExit(f"{case.what}: ours gives {results[0]:.6g}, {case.peer} {results[1]:.6g}")
    ratio = best[1] / best[0]
    reached = (case.ratio is None or ratio >= case.ratio) and (case.extra_mb is None or extra[0] <= case.extra_mb)
    return {
        "what": case.what, "peer": case.peer, "ms": best[0] * 1e3, "peer_ms": best[1] * 1e3, "ratio": ratio,
        "goal_ratio": case.ratio, "extra_mb": extra[0], "peer_extra_mb": extra[1], "goal_extra_mb": case.extra_mb,
        "reached": reached,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=CASES, action="append", help="this comparison; may stand several times")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    missing = [name for name in ("torch", "bitsandbytes") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} not installed here; how to is in the first lines of {Path(__file__).name}")
    rows = [compare(CASES[name]) for name in args.only or CASES]
    if args.json:
        print(json.dumps({"cores": os.cpu_count(), "results": rows}, indent=2))
        return
    line = "{:<26}{:<19}{:>10}{:>10}{:>8}{:>9}{:>11}{:>11}{:>9}"
    print(line.format("", "peer", "ours ms", "peer ms", "ratio", "goal", "ours +MB", "peer +MB", "reached"))
    for r in rows:
        goal = f">={r['goal_ratio']:g}" if r["goal_ratio"] else f"<={r['goal_extra_mb']:g}MB"
        numbers = [f"{r[key]:.1f}" for key in ("ms", "peer_ms", "ratio")]
        memory = [f"{r[key]:.0f}" for key in ("extra_mb", "peer_extra_mb")]
        print(line.format(r["what"], r["peer"], *numbers, goal, *memory, "yes" if r["reached"] else "no"))


if __name__ == "__main__":
    main()
