"""What all benchmarks share: the clock, and the machine's own ceilings measured the same way."""

import time
from collections.abc import Callable
from typing import Any

from magellano.backend import compute_dtype, describe, mx, on_gpu
from magellano.ops import launch

_MOST_COPIES = 64  # of two gigabytes, a tenth of a second on a large GPU


def seconds(work: Callable[[], Any], repeats: int = 5) -> float:
    """The best of `repeats` timings of `work`, whose results are evaluated, after one that warms up."""
    mx.eval(work())
    best = float("inf")
    for _ in range(repeats):
        mx.synchronize()
        started = time.perf_counter()
        mx.eval(work())
        mx.synchronize()
        best = min(best, time.perf_counter() - started)
    return best


def on_device(work: Callable[[], Any], repeats: int = 5) -> float:
    """Seconds that the device itself needs for what `work` launches: it is queued behind copies that keep the device
    busy until the host has launched all of it, and their time is taken off. For some 100 launches: MLX lets ten batches
    wait (see backend.py). On a CPU, where operations compute at once, the same as `seconds`. Raises RuntimeError where
    the host cannot get ahead.
    """
    if not on_gpu():
        return seconds(work, repeats)
    x, copies = mx.ones((1 << 29,)), 8  # few and large: they are launches that wait, too
    mx.eval(work(), x)

    def busy(x: mx.array) -> mx.array:
        for _ in range(copies):
            x = x + 1
        return x

    def timed(*more: Callable[[], Any]) -> tuple[float, float]:
        """Seconds until the device was done, and until the host was."""
        mx.synchronize()
        started = time.perf_counter()
        made = [busy(x)]
        mx.async_eval(made)
        for each in more:
            made.append(each())
            mx.async_eval(made[-1])
        launched = time.perf_counter() - started
        mx.synchronize()
        return time.perf_counter() - started, launched

    while copies <= _MOST_COPIES:
        alone = min(timed()[0] for _ in range(repeats))
        found = [total for total, launched in (timed(work) for _ in range(repeats)) if launched < alone]
        if found:
            return min(found) - alone
        copies *= 2
    raise RuntimeError(f"the host took longer to launch this than the device for {copies // 2} copies")


def peak(work: Callable[[], Any]) -> int:
    """Bytes that `work` needs beside what is there already."""
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(work())
    mx.synchronize()
    return mx.get_peak_memory() - before


def pick(cpu: int, gpu: int) -> int:
    """A size that suits the machine."""
    return gpu if on_gpu() else cpu


def copy_bandwidth() -> float:
    """Bytes read and written per second by the plainest elementwise operation."""
    x = mx.ones((pick(1 << 24, 1 << 28),))
    mx.eval(x)
    return 2 * x.nbytes / seconds(lambda: x + 1)


def matmul_rate() -> float:
    """Floating-point operations per second of a square product in the dtype that models compute in."""
    n = pick(1024, 8192)
    a = mx.random.normal((n, n)).astype(compute_dtype("auto"))
    mx.eval(a)
    return 2 * n**3 / seconds(lambda: a @ a)


def where() -> dict[str, Any]:
    """Back end, device, dialect of the kernels and why."""
    facts = describe()
    return {
        **{key: facts[key] for key in ("backend", "device", "mlx", "blas")},
        "dialect": str(launch.dialect()),
        "why": launch.why(),
    }


def row(what: str, time_s: float, baseline_s: float, share: float, **more: float) -> dict[str, Any]:
    """A line of a benchmark's table. `ratio`: how many times faster than the baseline; `share`: of the ceiling."""
    return {"what": what, "ms": time_s * 1e3, "ratio": baseline_s / time_s, "share_of_ceiling": share, **more}
