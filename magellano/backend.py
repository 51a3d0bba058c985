"""Prepares this process for MLX, once, before `mlx.core` is first imported. Every other module says
`from magellano.backend import mx, nn`; a test holds that no file imports `mlx` on its own.

On a Linux CPU three things decide the speed, all measured:
- MLX's wheel links the reference BLAS: 5 GFLOP/s in float32 on two cores. A BLAS loaded first with RTLD_GLOBAL takes
  the `cblas_*` calls over: pip's MKL gives 150 GFLOP/s. Float16 and bfloat16 products do not go through BLAS at all, so
  a CPU computes in float32.
- glibc hands blocks over 32 MB back to the system, so each large array page-faults anew. Two `mallopt` calls keep them.
- MKL and our host kernels must share one OpenMP runtime, GNU's, or their threads fight over the cores.
On macOS none of this applies: MLX brings Accelerate and Metal. On an NVIDIA GPU launches go out one by one.
"""

import ctypes
import ctypes.util
import os
import platform
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from magellano.info import memory_bytes

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_DEVICE_SHARE = 0.95  # of its memory that MLX may take: MLX refuses to be given all
_NO_BLAS = "no fast BLAS found: float32 matrix products run about 30 times slower; install `mkl` (x86-64) or OpenBLAS"


@dataclass(frozen=True)
class Blas:
    """Which BLAS serves MLX on the CPU, and why it was chosen."""

    name: str
    why: str


def _load_blas() -> Blas:
    if sys.platform != "linux":
        return Blas("accelerate", "MLX links Apple's Accelerate")
    if "mlx.core" in sys.modules:
        warnings.warn("mlx was imported before magellano, too late to replace its BLAS: " + _NO_BLAS, stacklevel=3)
        return Blas("reference", "mlx.core was imported before magellano")
    if platform.machine() == "x86_64":
        os.environ.setdefault("MKL_THREADING_LAYER", "GNU")
        for library in sorted((Path(sys.prefix) / "lib").glob("libmkl_rt.so*")):
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            return Blas("mkl", f"pip's mkl at {library.name}, loaded before MLX")
    for name in ("openblas", "cblas"):
        if found := ctypes.util.find_library(name):
            ctypes.CDLL(found, mode=ctypes.RTLD_GLOBAL)
            return Blas("openblas", f"the system's {found}, loaded before MLX (no mkl for this Python)")
    warnings.warn(_NO_BLAS, stacklevel=3)
    return Blas("reference", "neither pip's mkl nor a system OpenBLAS was found")


def _keep_large_blocks() -> None:
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, 2**31 - 1)
        libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _launch_directly() -> None:
    """MLX's CUDA build gathers launches in graphs, whose making costs the host as much as the launches themselves, and
    more for small batches: production3b 1 x 512 took 112 ms a step without, 161 with them. And it frees what launches
    used once a batch of them is done: 30 by default, ten batches of which may be under way, so that a step held 1 GiB
    that nobody needed. Smaller ones leave less, and cost the host some time. $MLX_USE_CUDA_GRAPHS and
    $MLX_MAX_OPS_PER_BUFFER decide otherwise. On macOS the latter means Metal's command buffers, which stay as MLX has
    them.
    """
    if sys.platform == "linux":
        os.environ.setdefault("MLX_USE_CUDA_GRAPHS", "0")
        os.environ.setdefault("MLX_MAX_OPS_PER_BUFFER", "16")


_keep_large_blocks()
_launch_directly()
BLAS = _load_blas()

import mlx.core as mx  # noqa: E402
import mlx.nn as nn  # noqa: E402
from mlx.utils import tree_flatten, tree_map, tree_unflatten  # noqa: E402

__all__ = [
    "BLAS",
    "Blas",
    "compute_dtype",
    "describe",
    "device_memory",
    "hold_memory",
    "mx",
    "nn",
    "on_gpu",
    "tree_flatten",
    "tree_map",
    "tree_unflatten",
]


def on_gpu() -> bool:
    """True where MLX's default device is a GPU (Metal or CUDA)."""
    return mx.default_device().type == mx.DeviceType.gpu


def compute_dtype(name: str) -> mx.Dtype:
    """MLX's dtype for a profile's `compute` ("auto" settles by device). Unknown names raise ValueError."""
    table = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
    if name == "auto":
        return mx.bfloat16 if on_gpu() else mx.float32
    if name not in table:
        raise ValueError(f"unknown compute dtype {name!r}: one of auto, {', '.join(table)}")
    return table[name]


def device_memory() -> int | None:
    """Bytes that arrays can have on the default device: the GPU's own, or what it shares; None where it is not told."""
    if not on_gpu():
        return memory_bytes()
    facts = mx.device_info()
    for key in ("total_memory", "max_recommended_working_set_size", "memory_size"):  # CUDA's name; Metal's two
        if int(facts.get(key, 0)) > 0:
            return int(facts[key])
    return memory_bytes()


@contextmanager
def hold_memory(limit: int) -> Iterator[int]:
    """Inside the `with` MLX keeps to about `limit` bytes, and to 95 % of the device's; gives what is set.

    Launches run ahead of what is freed: unheld, a step on a GPU needs several times its plan. Over the limit MLX waits
    for running work before it allocates, and its cache of freed blocks counts towards it. It is no hard limit: with
    nothing to wait for MLX allocates beyond it.
    """
    available = device_memory()
    held = limit if available is None else min(limit, int(_DEVICE_SHARE * available))
    before = mx.set_memory_limit(held), mx.set_cache_limit(held)
    try:
        yield held
    finally:
        mx.set_memory_limit(before[0])
        mx.set_cache_limit(before[1])


def describe() -> dict[str, str]:
    """What was chosen and why, for `magellano info` and the reports."""
    device = mx.device_info() if on_gpu() else {}
    kind = "cpu"
    if on_gpu():
        kind = "metal" if mx.metal.is_available() else "cuda"
    return {
        "backend": kind,
        "device": str(device.get("device_name", platform.processor() or platform.machine())),
        "mlx": version("mlx"),
        "blas": BLAS.name if not on_gpu() else "-",
        "why": BLAS.why if not on_gpu() else f"MLX's default device is {mx.default_device()}",
        "compute": "bfloat16" if on_gpu() else "float32 (16-bit products on a CPU do not go through BLAS)",
    }
