"""Sweeps the scan's GPU geometry: `python benchmarks/gpu_scan.py` prints the times of each, fastest first.

Sizes are those that mamba-ssm's CUDA kernels were measured at: float16, N 16, gate, skip and softplus fused. Time of the
kernels: many runs in one graph, each waiting for the one before; time per call: each run evaluated by itself.
Geometries are compiled beforehand by several processes, whose results MLX keeps on disk.
"""

import concurrent.futures
import itertools
import multiprocessing
import os
import time
from collections.abc import Callable

from magellano.backend import describe, mx, on_gpu
from magellano.benchmark import machine
from magellano.errors import InputError
from magellano.ops import launch
from magellano.ops.selective_scan import Geometry, backward, forward

NAMES = ("x", "dt", "A", "b", "c", "skip", "z", "dt_bias")
SIZES = ((4, 512, 4096), (1, 16384, 4096))  # B, T, I
N = 16
FORWARD = [
    Geometry(lanes, 1, simdgroups, steps, 32, segments)
    for lanes, simdgroups, steps, segments in itertools.product((1, 2, 4), (2, 4), (8, 16), (1, 2, 4, 8))
]
BACKWARD = [
    Geometry(lanes, 1, simdgroups, steps, 32, segments)
    for lanes, simdgroups, steps, segments in itertools.product((1, 2, 4), (1, 2, 4), (8, 16), (1, 2, 4, 8))
    if steps * (N // lanes) <= 128
]
Inputs = tuple[dict[str, mx.array], mx.array]


def inputs(B: int, T: int, I: int, dtype: mx.Dtype) -> Inputs:
    """Seeded inputs as a trained model has them, and a cotangent."""
    mx.random.seed(0)
    normal = mx.random.normal
    A = -mx.broadcast_to(mx.arange(1, N + 1).astype(mx.float32), (I, N)) * mx.ones((I, N))
    values = (normal((B, T, I)), 0.5 * normal((B, T, I)), A, normal((B, T, N)), normal((B, T, N)), mx.ones(I),
              normal((B, T, I)), normal((I,)) - 4)  # fmt: skip
    given = {n: v if n in ("A", "skip", "dt_bias") else v.astype(dtype) for n, v in zip(NAMES, values, strict=True)}
    return given, normal((B, T, I)).astype(dtype)


def ahead(v: Inputs, chosen: Geometry) -> Callable[[mx.array], list[mx.array]]:
    """The forward as a function of x."""
    return lambda x: forward({**v[0], "x": x}, chosen)


def back(v: Inputs, chosen: Geometry) -> Callable[[mx.array], list[mx.array]]:
    """The backward with frozen parameters and its sums over partial results, as a function of x."""
    borders = forward(v[0], chosen)[2]
    mx.eval(borders)
    wanted = ("x", "dt", "b", "c", "z")

    def run(x: mx.array) -> list[mx.array]:
        grads = backward({**v[0], "x": x}, borders, v[1], None, chosen, frozen=True)
        return [grads[name] for name in wanted]

    return run


def milliseconds(run: Callable[[mx.array], list[mx.array]], x: mx.array, chain: int) -> float:
    """The best of three chains of `chain` runs, each run waiting for the one before, per run."""

    def work() -> list[mx.array]:
        made: list[mx.array] = []
        for _ in range(chain):
            made = run(mx.depends([x], made)[0] if made else x)
        return made

    return machine.seconds(work, 3) / chain * 1e3


def compile_part(part: int, parts: int) -> None:
    """Runs every `parts`-th geometry once at a tiny size."""
    v = inputs(1, 64, 256, mx.float16)
    for chosen in FORWARD[part::parts]:
        mx.eval(forward(v[0], chosen))
    for chosen in BACKWARD[part::parts]:
        borders = forward(v[0], Geometry(4, 1, 2, chosen.steps, 32))[2]
        mx.eval(list(backward(v[0], borders, v[1], None, chosen, frozen=True).values()))


def sweep(what: str, geometries: list[Geometry], make: Callable[[Inputs, Geometry], Callable], keep: int = 6) -> None:
    """Prints the fastest geometries of every size."""
    for B, T, I in SIZES:
        v = inputs(B, T, I, mx.float16)
        mx.eval(v)
        times = {}
        for chosen in geometries:
            if T // chosen.steps < 4 * chosen.segments or (T > 1024) != (chosen.segments > 1) and T > 1024:
                continue
            times[chosen] = milliseconds(make(v, chosen), v[0]["x"], 16 if T < 1024 else 3)
        for chosen, ms in sorted(times.items(), key=lambda item: item[1])[:keep]:
            one = machine.seconds(lambda chosen=chosen: make(v, chosen)(v[0]["x"]), 10) * 1e3  # type: ignore[misc]
            shape = f"lanes {chosen.lanes:2} simdgroups {chosen.simdgroups} steps {chosen.steps:2}"
            print(f"{what} B {B} T {T}: {shape} segments {chosen.segments}: {ms:.3f} ms, per call {one:.3f}", flush=True)


def main() -> None:
    """Compiles, then measures both directions."""
    if not on_gpu():
        raise InputError("gpu_scan: MLX's default device is not a GPU; `magellano benchmark scan` times the CPU")
    print(describe(), launch.dialect(), f"copy {machine.copy_bandwidth() / 1e9:.0f} GB/s")
    started, parts = time.perf_counter(), min(12, os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(parts, mp_context=context) as pool:
        list(pool.map(compile_part, range(parts), itertools.repeat(parts)))
    print(f"compiled in {time.perf_counter() - started:.0f} s", flush=True)
    sweep("forward", FORWARD, ahead)
    sweep("backward", BACKWARD, back)


if __name__ == "__main__":
    main()
