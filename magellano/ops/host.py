"""Runs a kernel text on the CPU: C++ made from it with kernels/host.h in front, built by the system's compiler at first
use and kept in a cache, called through ctypes on MLX's own buffers.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from magellano.backend import mx
from magellano.errors import InputError
from magellano.info import cache_root

KERNELS = Path(__file__).resolve().parents[2] / "kernels"
Template = Mapping[str, mx.Dtype | int | bool]

_SIZES = {
    "thread_index_in_threadgroup": "l",
    "thread_index_in_simdgroup": "l % SIMD_W",
    "simdgroup_index_in_threadgroup": "l / SIMD_W",
}
_PLACES = {
    "thread_position_in_grid": "uint3{gx * g[3] + l, y, z}",
    "thread_position_in_threadgroup": "uint3{l, 0, 0}",
    "threadgroup_position_in_grid": "uint3{gx, y, z}",
    "threads_per_threadgroup": "uint3{g[3], 1, 1}",
    "threadgroups_per_grid": "uint3{g[0], g[1], g[2]}",
}
_C_TYPES = {
    mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat", mx.bool_: "bool",
    mx.uint8: "uint8_t", mx.uint16: "uint16_t", mx.uint32: "uint32_t", mx.uint64: "uint64_t",
    mx.int8: "int8_t", mx.int16: "int16_t", mx.int32: "int32_t", mx.int64: "int64_t",
}  # fmt: skip


@dataclass(frozen=True)
class Compiler:
    """The C++ compiler, its version line, the flags that it takes here, and what else decides the machine code."""

    path: str
    version: str
    flags: tuple[str, ...]
    cpu: str


class KernelBuildError(RuntimeError):
    """The system's C++ compiler, or NVRTC, refused a kernel; the message holds its output."""


class TracedError(RuntimeError):
    """A host kernel was asked to run inside mx.compile or mx.vmap, where arrays have no values yet."""


def compiler_path() -> str | None:
    """$CXX, else the first of c++, g++ and clang++ that is installed."""
    for name in (os.environ.get("CXX"), "c++", "g++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    return None


@functools.cache
def compiler() -> Compiler:
    """The compiler with the flags it accepts. Raises KernelBuildError where there is none."""
    path = compiler_path()
    if path is None:
        raise KernelBuildError("no C++ compiler found for the CPU kernels: install g++ or clang, or set $CXX")
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    # Never -ffast-math: a library linked with it makes the whole process flush subnormals to zero when it is loaded.
    flags = ["-O3", "-std=c++17", "-fPIC", "-shared", "-w", "-fno-math-errno", "-fno-trapping-math"]
    for choices in (("-march=native", "-mcpu=native"), ("-fopenmp", "-fopenmp-simd")):
        flags += next(([flag] for flag in choices if _accepts(path, flag)), [])
    return Compiler(path, version, tuple(flags), _cpu())


def _accepts(path: str, flag: str) -> bool:
    include = "#include <omp.h>\n" if flag == "-fopenmp" else ""
    with tempfile.TemporaryDirectory() as folder:
        command = [path, flag, "-shared", "-fPIC", "-x", "c++", "-", "-o", f"{folder}/probe"]
        return subprocess.run(command, input=include + "int probe;\n", capture_output=True, text=True).returncode == 0


def _cpu() -> str:
    """Names the CPU's instruction set: -march=native code must not travel through a shared home folder."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), platform.machine())
    return f"{platform.machine()} {platform.processor()}"


def cache_folder() -> Path:
    """`kernels/` below the cache (info.cache_root)."""
    folder = cache_root() / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise unwritable(folder, e) from None
    return folder


def unwritable(folder: Path, e: OSError) -> InputError:
    """The error of a cache that cannot be written, with the remedy."""
    return InputError(f"cannot write the kernel cache {folder}: {e.strerror}; set MAGELLANO_CACHE to a writable folder")


def source(
    body: str,
    header: str,
    inputs: Mapping[str, mx.Dtype],
    outputs: Mapping[str, mx.Dtype],
    template: Template,
    fibers: bool,
    in_place: bool = False,
) -> str:
    """The C++ file: compatibility headers, template constants, the body as a function, a loop over the threadgroups.
    `in_place`: outputs may lie over inputs.
    """
    alone = "" if in_place else " __restrict__"
    shapes = [name for name in inputs if f"{name}_shape" in body]
    strides = [name for name in inputs if f"{name}_strides" in body]
    attributes = {a: how for a, how in (_SIZES | _PLACES).items() if a in body}
    parameters = [f"const {_C_TYPES[t]}*{alone} {n}" for n, t in inputs.items()]
    parameters += [f"{_C_TYPES[t]}*{alone} {n}" for n, t in outputs.items()]
    parameters += [f"const int* {n}_shape" for n in shapes] + [f"const int64_t* {n}_strides" for n in strides]
    arguments = [f"(const {_C_TYPES[t]}*)p[{i}]" for i, t in enumerate(inputs.values())]
    arguments += [f"({_C_TYPES[t]}*)p[{len(inputs) + i}]" for i, t in enumerate(outputs.values())]
    done = len(inputs) + len(outputs)
    arguments += [f"(const int*)p[{done + i}]" for i in range(len(shapes))]
    arguments += [f"(const int64_t*)p[{done + len(shapes) + i}]" for i in range(len(strides))]
    parameters += [f"const {'uint' if a in _SIZES else 'uint3'} {a}" for a in attributes]
    arguments += list(attributes.values())
    call = f"body({', '.join(arguments)});"
    constants = [_constant(name, value) for name, value in template.items()]
    headers = [(KERNELS / name).read_text() for name in (["fibers.h"] if fibers else []) + ["host.h", "common.h"]]
    inside = f"const uint l = 0; {call}"
    if fibers:
        inside = f"fiber_run(g[3], [&](int fiber) {{ const uint l = fiber; {call} }});"
    return "\n".join([
        *headers, header, *constants,
        f"static inline __attribute__((always_inline)) void body({', '.join(parameters)}) {{", body, "}",
        'extern "C" int run(void** p, const uint* g) {',
        "  const long groups = (long)g[0] * g[1] * g[2];",
        "#pragma omp parallel for schedule(dynamic, 1)",
        "  for (long i = 0; i < groups; i++) {",
        "    const uint gx = i % g[0], y = i / g[0] % g[1], z = i / ((long)g[0] * g[1]);",
        f"    {inside}", "  }",
        f"  return {'fiber_diverged' if fibers else '0'};", "}", "",
    ])  # fmt: skip


def _constant(name: str, value: mx.Dtype | int | bool) -> str:
    if isinstance(value, mx.Dtype):
        return f"typedef {_C_TYPES[value]} {name};"
    return f"static constexpr int {name} = {int(value)};"


@functools.cache
def build(name: str, text: str, exact: bool) -> ctypes._CFuncPtr:  # type: ignore[name-defined]
    """Compiles `text` unless the cache has it. `exact` forbids fused multiply-add, for kernels compared bit by bit.

    Raises KernelBuildError with the compiler's output. Two processes may build at once: each publishes by rename.
    """
    c = compiler()
    flags = [*c.flags, "-ffp-contract=" + ("off" if exact else "fast")]
    key = hashlib.sha256("\0".join([text, c.path, c.version, *flags, c.cpu]).encode()).hexdigest()[:24]
    library = cache_folder() / f"{name}-{key}.so"
    if not library.exists():
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            written, built = Path(folder) / f"{name}.cpp", Path(folder) / f"{name}.so"
            written.write_text(text)
            command = [c.path, *flags, str(written), "-o", str(built), "-lm"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                said = f"{' '.join(command)}\n{done.stderr[-4000:]}"
                raise KernelBuildError(f"kernel {name} does not compile with {c.version}: {said}")
            os.replace(built, library)
    run = ctypes.CDLL(str(library)).run
    run.argtypes, run.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_int
    return run


def view(array: mx.array) -> np.ndarray:
    """An evaluated array's own memory as it lies (bfloat16 as uint16), writable."""
    if array.dtype == mx.bfloat16:
        array = array.view(mx.uint16)
        mx.eval(array)
    return np.array(array, copy=False)


def strides(array: mx.array) -> tuple[int, ...]:
    """How an evaluated array lies in memory: from one element to the next along each axis, in elements."""
    return tuple(s // array.itemsize for s in view(array).strides)


def evaluate(arrays: Sequence[mx.array], name: str) -> None:
    """mx.eval, with an error that says what to do where the arrays are only traced."""
    try:
        mx.eval(*arrays)
    except ValueError as e:
        if "function transformations" not in str(e):
            raise
        raise TracedError(
            f"{name}: CPU kernels compute at once and cannot run inside mx.compile or mx.vmap; call it outside, "
            "or under magellano.ops.launch.use(Dialect.REFERENCE)"
        ) from None


def call(
    run: ctypes._CFuncPtr,  # type: ignore[name-defined]
    name: str,
    inputs: Sequence[mx.array],
    shapes: Sequence[tuple[int, ...]],
    strides: Sequence[tuple[int, ...]],
    outputs: Sequence[mx.array],
    groups: tuple[int, int, int],
    threads: int,
) -> None:
    """Runs a built kernel: reads the inputs where they lie, fills `outputs`, which must be fresh, evaluated arrays."""
    kept = [view(a) for a in (*inputs, *outputs)]
    kept += [np.asarray(s, np.int32) for s in shapes] + [np.asarray(s, np.int64) for s in strides]
    pointers = (ctypes.c_void_p * len(kept))(*[a.ctypes.data for a in kept])
    line = run(pointers, (ctypes.c_uint * 4)(*groups, threads))
    if line:
        where = f"line {line} of the generated source"
        raise RuntimeError(f"kernel {name}: not every thread reaches the barrier or shuffle at {where}")
