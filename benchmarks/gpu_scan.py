"""Sweeps the scan's GPU geometry: `python benchmarks/gpu_scan.py [forward|backward]` prints times, fastest first.

Sizes are those that mamba-ssm was measured at: float16, N 16, gate, skip and softplus fused. The first
time: many runs in one graph, each waiting for the one before (benchmark/scan.py); per call: each evaluated by itself.
Several processes compile; a lock lets only one of them measure.
"""

import concurrent.futures
import itertools
import multiprocessing
import os
import sys
from collections.abc import Callable
from multiprocessing.synchronize import Lock

from magellano.backend import describe, mx, on_gpu
from magellano.benchmark import machine
from magellano.benchmark.scan import GPU_SIZES as SIZES
from magellano.benchmark.scan import N, chained, inputs
from magellano.errors import InputError
from magellano.ops import launch
from magellano.ops.selective_scan import Geometry, backward, forward

FORWARD = [
    Geometry(lanes, 1, simdgroups, steps, 32, segments)
    for lanes, simdgroups, steps, segments in itertools.product((1, 2, 4), (2, 4), (8, 16), (1, 2))
]
BACKWARD = [
    Geometry(lanes, 1, simdgroups, steps, 32, segments)
    for lanes, simdgroups, steps, segments in itertools.product((2, 4, 8), (1, 2, 4, 8), (8, 16), (1, 2))
    if (steps * N // lanes <= 64 or (lanes, simdgroups) == (2, 1)) and (segments == 1 or simdgroups == 2)
]
Inputs = tuple[dict[str, mx.array], mx.array]


def ahead(v: Inputs, chosen: Geometry) -> Callable[[mx.array], list[mx.array]]:
    """The forward as a function of dt_bias."""
    return lambda bias_I: forward({**v[0], "dt_bias": bias_I}, chosen)


def back(v: Inputs, chosen: Geometry) -> Callable[[mx.array], list[mx.array]]:
    """The backward with frozen parameters and its sums over partial results, as a function of dt_bias."""
    borders = forward(v[0], Geometry(4, 1, 4, chosen.steps, 32))[2]
    mx.eval(borders)
    wanted = ("x", "dt", "b", "c", "z")

    def run(bias_I: mx.array) -> list[mx.array]:
        grads = backward({**v[0], "dt_bias": bias_I}, borders, v[1], None, chosen, frozen=True)
        return [grads[name] for name in wanted]

    return run


_lock: Lock


def _keep(lock: Lock) -> None:
    global _lock
    _lock = lock


def times(way: str, chosen: Geometry) -> list[tuple[float, float]]:
    """Milliseconds of the kernels and of a call, at every size."""
    make = {"forward": ahead, "backward": back}[way]
    small = inputs(1, 64, 256, mx.float16)
    mx.eval(make(small, chosen)(small[0]["dt_bias"]))  # compiles
    found = []
    with _lock:
        for B, T, I in SIZES:
            v = inputs(B, T, I, mx.float16)
            mx.eval(v)
            run, bias_I = make(v, chosen), v[0]["dt_bias"]
            kernels = chained(run, bias_I, 16 if T < 1024 else 3) * 1e3
            found.append((kernels, machine.seconds(lambda run=run, bias_I=bias_I: run(bias_I)) * 1e3))  # type: ignore[misc]
        del v, run, bias_I
        mx.clear_cache()
    return found


def main() -> None:
    """Measures every geometry in the directions asked for, and prints the fastest at every size."""
    if not on_gpu():
        raise InputError("gpu_scan: MLX's default device is not a GPU; `magellano benchmark scan` times the CPU")
    print(describe(), launch.dialect(), f"copy {machine.copy_bandwidth() / 1e9:.0f} GB/s", flush=True)
    context = multiprocessing.get_context("spawn")
    workers = min(12, os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(workers, context, _keep, (context.Lock(),)) as pool:
        for way in sys.argv[1:] or ("forward", "backward"):
            geometries = {"forward": FORWARD, "backward": BACKWARD}[way]
            found = list(pool.map(times, [way] * len(geometries), geometries))
            for number, (B, T, _) in enumerate(SIZES):
                for chosen, ms in sorted(zip(geometries, found, strict=True), key=lambda pair: pair[1][number])[:8]:
                    shape = f"lanes {chosen.lanes:2} simdgroups {chosen.simdgroups} steps {chosen.steps:2}"
                    kernels, call = ms[number]
                    line = f"{shape} segments {chosen.segments}: {kernels:.3f} ms, per call {call:.3f}"
                    print(f"{way} B {B} T {T}: {line}", flush=True)


if __name__ == "__main__":
    main()
