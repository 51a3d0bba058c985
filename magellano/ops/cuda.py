"""Compiles kernels for an NVIDIA GPU through NVRTC and keeps them on disk, beside the CPU's. MLX compiles its custom
kernels anew in every process, together with headers that take far longer than the kernel.

`source` makes the whole text of a kernel from kernels/<name>.metal, `cubin` the machine code of any text that has an
extern "C" kernel of the given name, and a `Built` launches it through MLX.
"""

import ctypes
import functools
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magellano.backend import mx
from magellano.errors import InputError
from magellano.ops.host import KERNELS, KernelBuildError, Template, cache_folder, unwritable

_NEEDED = ("cuda_fp16.h", "cuda_bf16.h")
_READ = ("cuda_fp16.hpp", "cuda_bf16.hpp", *_NEEDED)  # the headers' text that can reach a kernel's code
_NO_NVRTC = (
    "the CUDA kernels need NVRTC, and no libnvrtc.so is found: pip install nvidia-cuda-nvrtc, "
    "or set CUDA_HOME to a CUDA toolkit, or MAGELLANO_NVRTC to the library"
)
_NO_HEADERS = (
    "the CUDA kernels need the CUDA headers, and no folder with cuda_fp16.h and cuda_bf16.h is found: pip install "
    "nvidia-cuda-runtime, or set CUDA_HOME to a CUDA toolkit"
)
_DIGEST = 32  # bytes of SHA-256 in front of the machine code in a file
C_TYPES = {
    mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.bool_: "bool",
    mx.uint8: "uint8_t", mx.uint16: "uint16_t", mx.uint32: "uint32_t", mx.uint64: "uint64_t",
    mx.int8: "int8_t", mx.int16: "int16_t", mx.int32: "int32_t", mx.int64: "int64_t",
}  # fmt: skip
_FIXED_WIDTHS = {8: "char", 16: "short", 32: "int", 64: "long"}  # NVRTC has no <stdint.h>


@dataclass(frozen=True)
class Toolkit:
    """NVRTC, loaded, with its version, and the folder of the CUDA headers with a digest of those that are included."""

    library: ctypes.CDLL
    version: str
    headers: Path
    digest: str


@functools.cache
def toolkit() -> Toolkit:
    """What compiles here, looked for once per process. Raises InputError where NVRTC or the headers are missing.

    NVRTC: $MAGELLANO_NVRTC, what MLX has loaded, pip's beside MLX, the loader's own path, $CUDA_HOME, $CUDA_PATH,
    /usr/local/cuda. Headers: $CUDA_HOME, $CUDA_PATH, /usr/local/cuda, pip's beside MLX.
    """
    library = _library()
    headers = next((f for f in _header_folders() if all((f / name).is_file() for name in _NEEDED)), None)
    if headers is None:
        raise InputError(_NO_HEADERS)
    digest = hashlib.sha256()
    for name in _READ:
        if (headers / name).is_file():
            digest.update((headers / name).read_bytes())
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    return Toolkit(library, f"{major.value}.{minor.value}", headers, digest.hexdigest())


def _library() -> ctypes.CDLL:
    if named := os.environ.get("MAGELLANO_NVRTC"):
        try:
            return ctypes.CDLL(named)
        except OSError as e:
            raise InputError(f"MAGELLANO_NVRTC={named}: cannot be loaded as NVRTC: {e}") from None
    for candidate in _libraries():
        try:
            return ctypes.CDLL(candidate)
        except OSError:  # not there, or for another machine: the next; none at all is an error
            continue
    raise InputError(_NO_NVRTC)


def _libraries() -> Iterator[str]:
    maps = Path("/proc/self/maps")
    if maps.exists():
        yield from dict.fromkeys(re.findall(r"/\S*/libnvrtc\.so\S*", maps.read_text()))
    for pattern in ("nvidia/cu*/lib", "nvidia/cuda_nvrtc/lib"):
        yield from _newest(_packages().glob(f"{pattern}/libnvrtc.so*"))
    yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")
    for home in _homes():
        yield from _newest(home.glob("lib64/libnvrtc.so*"))


def _newest(paths: Iterator[Path]) -> list[str]:
    return sorted(map(str, paths), reverse=True)


def _header_folders() -> Iterator[Path]:
    yield from (home / "include" for home in _homes())
    for pattern in ("nvidia/cu*/include", "nvidia/cuda_runtime/include"):
        yield from sorted(_packages().glob(pattern), reverse=True)


def _homes() -> list[Path]:
    named = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    return [Path(home) for home in named if home]


def _packages() -> Path:
    """The site-packages folder that MLX is in."""
    return Path(str(mx.__file__)).resolve().parents[1]


@functools.cache
def architecture() -> str:
    """The default device's, such as sm_90."""
    info = mx.device_info()
    return f"sm_{info['compute_capability_major']}{info['compute_capability_minor']}"


@functools.cache
def processors() -> int:
    """How many multiprocessors the default device has. Raises InputError where the driver does not say."""
    found, multiprocessor_count = ctypes.c_int(), 16
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        failed = driver.cuDeviceGetAttribute(ctypes.byref(found), multiprocessor_count, 0)
    except OSError as e:
        raise InputError(f"the CUDA driver cannot be asked for the number of multiprocessors: {e}") from None
    if failed or found.value < 1:
        raise InputError(f"the CUDA driver does not tell the number of multiprocessors: error {failed}")
    return found.value


def prelude() -> str:
    """What stands before the texts of a kernel's own header: CUDA's 16-bit types, the dialect's header, common.h."""
    widths = [
        f"typedef signed {word} int{n}_t; typedef unsigned {word} uint{n}_t;" for n, word in _FIXED_WIDTHS.items()
    ]
    includes = [f"#include <{name}>" for name in _NEEDED]
    return "\n".join([*includes, *widths, *((KERNELS / name).read_text() for name in ("cuda.h", "common.h"))])


def source(
    name: str,
    body: str,
    header: str,
    inputs: Mapping[str, mx.Dtype],
    outputs: Mapping[str, mx.Dtype],
    template: Template,
    dimensions: Mapping[str, int],
) -> str:
    """The complete text of a kernel: `prelude`, its own header, the function with the template's constants in front of
    its body. Its parameters: a pointer for each input and output, then as int scalars the sizes of the inputs that
    `dimensions` names, with the number of their axes. Strides it cannot have: only MLX knows them.
    """
    assert not any(f"{n}_strides" in body for n in inputs), name
    parameters = [f"const {C_TYPES[t]}* {n}" for n, t in inputs.items()]
    parameters += [f"{C_TYPES[t]}* {n}" for n, t in outputs.items()]
    sizes = {n: [f"{n}_shape_{axis}" for axis in range(count)] for n, count in dimensions.items()}
    parameters += [f"const int {size}" for of_one in sizes.values() for size in of_one]
    shapes = [f"  const int {n}_shape[{len(of_one)}] = {{{', '.join(of_one)}}};" for n, of_one in sizes.items()]
    constants = [constant(n, value) for n, value in template.items()]
    signature = f'extern "C" __global__ void {name}({", ".join(parameters)}) {{'
    return "\n".join([prelude(), header, signature, *shapes, *constants, body, "}", ""])


def constant(name: str, value: mx.Dtype | int | bool) -> str:
    if isinstance(value, mx.Dtype):
        return f"  using {name} = {C_TYPES[value]};"
    if isinstance(value, bool):
        return f"  constexpr bool {name} = {str(value).lower()};"
    return f"  constexpr int {name} = {value};"


def cubin(name: str, text: str, options: Sequence[str] = (), arch: str | None = None) -> bytes:
    """The machine code of `text`, which has an extern "C" kernel `name`, for `arch` (None: the device's): from memory,
    from disk, or compiled. `options`: more of NVRTC's.

    Raises KernelBuildError with NVRTC's words, InputError where NVRTC, its headers or a writable cache are missing. Two
    processes may compile at once: each publishes by rename. A file whose digest is wrong is made again.
    """
    return _cubin(name, text, tuple(options), arch or architecture())


def compiled(
    name: str, text: Callable[[str], str], options: Sequence[str] = (), arch: str | None = None
) -> tuple[str, bytes]:
    """A kernel's whole name, with its text's digest, since by it MLX finds a module that it has loaded; and `cubin`.
    `text`: of the whole name.
    """
    full = f"magellano_{name}_{hashlib.sha256(text('').encode()).hexdigest()[:12]}"
    return full, cubin(full, text(full), options, arch)


@functools.cache
def _cubin(name: str, text: str, options: tuple[str, ...], arch: str) -> bytes:
    tool = toolkit()
    flags = [f"--gpu-architecture={arch}", "-std=c++17", *options]
    parts = [text, "nvrtc", tool.version, tool.digest, *flags]
    key = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    path = cache_folder() / f"{name}-{key}.cubin"
    try:
        if path.exists():
            kept = path.read_bytes()
            if hashlib.sha256(kept[_DIGEST:]).digest() == kept[:_DIGEST]:
                return kept[_DIGEST:]
        code = _compile(tool, name, text, flags)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            written = Path(folder) / path.name
            written.write_bytes(hashlib.sha256(code).digest() + code)
            os.replace(written, path)
    except OSError as e:
        raise unwritable(path.parent, e) from None
    return code


def _compile(tool: Toolkit, name: str, text: str, flags: Sequence[str]) -> bytes:
    nvrtc, program = tool.library, ctypes.c_void_p()
    folders = [f"--include-path={f}" for f in (tool.headers, tool.headers / "cccl") if f.is_dir()]
    _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), text.encode(), f"{name}.cu".encode(), 0, None, None))
    try:
        words = [flag.encode() for flag in (*flags, *folders)]
        failed = nvrtc.nvrtcCompileProgram(program, len(words), (ctypes.c_char_p * len(words))(*words))
        if failed:
            said = _taken(nvrtc, "ProgramLog", program).rstrip(b"\0").decode(errors="replace").strip()
            said = said or _words_of(nvrtc, failed)
            by = f"NVRTC {tool.version} ({' '.join(flags)})"
            raise KernelBuildError(f"kernel {name} does not compile with {by}: {said[:4000]}")
        return _taken(nvrtc, "CUBIN", program)
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _taken(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    room = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, room))
    return room.raw


def _check(nvrtc: ctypes.CDLL, result: int) -> None:
    if result:
        raise KernelBuildError(f"NVRTC failed: {_words_of(nvrtc, result)}")


def _words_of(nvrtc: ctypes.CDLL, result: int) -> str:
    nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
    return str(nvrtc.nvrtcGetErrorString(result).decode())


@dataclass(frozen=True)
class Built:
    """A kernel as machine code, ready to be launched: `sized` are the numbers of the inputs whose sizes it takes."""

    name: str
    code: bytes
    sized: Sequence[int]

    def __call__(self, inputs: Sequence[mx.array], **how: Any) -> list[mx.array]:
        """`how`: grid, threadgroup, output_shapes, output_dtypes and the like of mx.fast.precompiled_cuda_kernel.
        Inputs with gaps are copied without.
        """
        sizes = [size for i in self.sized for size in inputs[i].shape]
        return mx.fast.precompiled_cuda_kernel(
            name=self.name,
            compiled_source=self.code,
            inputs=inputs,
            scalars=sizes,
            ensure_row_contiguous=True,
            **how,
        )
