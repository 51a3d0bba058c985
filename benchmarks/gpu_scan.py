"""Sweeps the scan's GPU geometry: `python benchmarks/gpu_scan.py` prints the error of each, and its times.

Sizes are those that mamba-ssm's CUDA kernels were measured at: float16, N 16, gate, skip and softplus fused.
"""

import itertools
import time
from collections.abc import Callable

from magellano.backend import describe, mx, on_gpu
from magellano.errors import InputError
from magellano.ops import launch
from magellano.ops.selective_scan import Geometry, backward, forward, reference

NAMES = ("x", "dt", "A", "b", "c", "skip", "z", "dt_bias")
SIZES = ((4, 512, 4096), (1, 16384, 4096))  # B, T, I
N = 16


def inputs(B: int, T: int, I: int, dtype: mx.Dtype) -> tuple[dict[str, mx.array], mx.array]:
    """Seeded inputs as a trained model has them, and a cotangent."""
    mx.random.seed(0)
    normal = mx.random.normal
    A = -mx.broadcast_to(mx.arange(1, N + 1).astype(mx.float32), (I, N))
    values = (normal((B, T, I)), 0.5 * normal((B, T, I)), A, normal((B, T, N)), normal((B, T, N)), mx.ones(I),
              normal((B, T, I)), normal((I,)) - 4)  # fmt: skip
    given = {n: v if n in ("A", "skip", "dt_bias") else v.astype(dtype) for n, v in zip(NAMES, values, strict=True)}
    return given, normal((B, T, I)).astype(dtype)


def milliseconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Median of three rounds, each of `repeats` calls evaluated one by one."""
    rounds = []
    mx.eval(call())
    for _ in range(3):
        mx.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            mx.eval(call())
        mx.synchronize()
        rounds.append((time.perf_counter() - start) / repeats * 1e3)
    return sorted(rounds)[1]


def error(chosen: Geometry) -> float:
    """The largest relative error of y and of every gradient, at a small ragged size in float32."""
    given, dy = inputs(2, 67, 136, mx.float32)
    y, _, borders = forward(given, chosen)
    grads = backward(given, borders, dy, None, chosen, frozen=False)
    (want_y,), want = mx.vjp(lambda *a: reference(*a)[0], list(given.values()), [dy])
    pairs = [(y, want_y), *((grads[n], w) for n, w in zip(given, want, strict=True))]
    worst = mx.stack([mx.abs(got - w).max() / mx.abs(w).max() for got, w in pairs]).max()
    return worst.item()  # type: ignore[return-value]


def times(chosen: Geometry, B: int, T: int, I: int) -> tuple[float, float]:
    """Milliseconds of the forward, and of the backward with frozen parameters and its sums over partial results."""
    given, dy = inputs(B, T, I, mx.float16)
    borders = forward(given, chosen)[2]
    mx.eval(given, dy, borders)
    ahead = milliseconds(lambda: forward(given, chosen))
    return ahead, milliseconds(lambda: list(backward(given, borders, dy, None, chosen, frozen=True).values()))


def main() -> None:
    """Every geometry at every size; errors first, so that a wrong one is seen before it is timed."""
    if not on_gpu():
        raise InputError("gpu_scan: MLX's default device is not a GPU; `magellano benchmark scan` times the CPU")
    print(describe(), launch.dialect())
    for lanes, simdgroups, steps in itertools.product((1, 2, 4, 8, 16), (1, 2, 4, 8), (4, 8, 16, 32)):
        if steps % lanes or steps * (N // lanes) > 128:  # role 1 needs whole rounds; more would spill registers
            continue
        chosen = Geometry(lanes, 1, simdgroups, steps, simd=32)
        shared = 4 * steps * (6 * chosen.group_channels + 2 * N * (1 + simdgroups))  # bytes, in the backward
        if shared > 32768:
            continue
        line = f"lanes {lanes:2} simdgroups {simdgroups} steps {steps:2}: error {error(chosen):.1e}"
        for B, T, I in SIZES:
            ahead, back = times(chosen, B, T, I)
            line += f" | B {B} T {T}: forward {ahead:.3f} ms, backward {back:.3f} ms"
        print(line, flush=True)


if __name__ == "__main__":
    main()
