"""The CUDA dialect's compiler and its cache; no test here needs a GPU. Where NVRTC and CUDA's headers are, real code is
compiled: MAGELLANO_NVRTC and CUDA_HOME may point at them.
"""

import ctypes
import errno
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from magellano.backend import mx
from magellano.errors import InputError
from magellano.ops import cuda, launch
from magellano.ops.host import KernelBuildError
from magellano.ops.launch import Dialect, Kernel

DOUBLE = (
    "const uint i = thread_position_in_grid.x, n = x_shape[0] * x_shape[1];\nif (i < n) ST(TX, y, i, 2.0f * LD(x, i));"
)


def kernel_text(name: str, body: str = DOUBLE) -> str:
    dtype = mx.bfloat16
    return cuda.source(name, body, "", {"x": dtype}, {"y": dtype}, {"TX": dtype}, {"x": 2})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, on disk and in memory."""
    monkeypatch.setenv("MAGELLANO_CACHE", str(tmp_path))
    cuda._cubin.cache_clear()
    return tmp_path / "kernels"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """The flags of each compilation by a compiler that answers with its own arguments."""
    seen: list[tuple[str, ...]] = []

    def compile_(tool: cuda.Toolkit, name: str, text: str, flags: Sequence[str]) -> bytes:
        seen.append(tuple(flags))
        return repr((name, text, flags)).encode()

    library = ctypes.CDLL(None)
    monkeypatch.setattr(cuda, "toolkit", lambda: cuda.Toolkit(library, "13.0", Path(), "digest"))
    monkeypatch.setattr(cuda, "_compile", compile_)
    return seen


@pytest.fixture
def nvrtc() -> None:
    try:
        cuda.toolkit()
    except InputError as e:
        pytest.skip(str(e))


def test_the_text_has_shapes_and_constants_in_front_of_the_body() -> None:
    inputs, outputs = {"x": mx.bfloat16, "at": mx.int32}, {"y": mx.float16, "flag": mx.bool_}
    text = cuda.source(
        "k", "BODY", "HEADER", inputs, outputs, {"TX": mx.float32, "N": -3, "ON": True}, {"x": 2, "at": 1}
    )
    lines = text.splitlines()
    assert lines[:2] == ["#include <cuda_fp16.h>", "#include <cuda_bf16.h>"]
    pointers = "const __nv_bfloat16* x, const int32_t* at, __half* y, bool* flag"
    assert lines[lines.index("HEADER") :] == [
        "HEADER",
        f'extern "C" __global__ void k({pointers}, const int x_shape_0, const int x_shape_1, const int at_shape_0) {{',
        "  const int x_shape[2] = {x_shape_0, x_shape_1};",
        "  const int at_shape[1] = {at_shape_0};",
        "  using TX = float;",
        "  constexpr int N = -3;",
        "  constexpr bool ON = true;",
        "BODY",
        "}",
    ]


def test_a_kernel_is_read_from_disk_the_second_time(cache: Path, compiled: list[tuple[str, ...]]) -> None:
    first = cuda.cubin("k", "text", arch="sm_90")
    cuda._cubin.cache_clear()  # as in the next process
    assert cuda.cubin("k", "text", arch="sm_90") == first
    assert compiled == [("--gpu-architecture=sm_90", "-std=c++17")]
    assert [path.name[:2] for path in cache.iterdir()] == ["k-"]


def test_a_damaged_file_is_made_again(cache: Path, compiled: list[tuple[str, ...]]) -> None:
    code = cuda.cubin("k", "text", arch="sm_90")
    (path,) = cache.iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:-1], whole[:-1] + b"?", whole[:7], b""):
        path.write_bytes(damaged)
        cuda._cubin.cache_clear()
        assert cuda.cubin("k", "text", arch="sm_90") == code
        assert path.read_bytes() == whole
    assert len(compiled) == 5


def test_whatever_decides_the_code_is_in_the_key(
    cache: Path, compiled: list[tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ways: list[dict[str, Any]] = [{}, {"options": ["--maxrregcount=32"]}, {"arch": "sm_100"}, {"text": "other"}]
    for way in ways:
        cuda.cubin("k", **{"text": "text", "arch": "sm_90", **way})
    tool = cuda.toolkit()
    for version, digest in (("13.1", tool.digest), (tool.version, "other headers")):
        monkeypatch.setattr(cuda, "toolkit", lambda v=version, d=digest: cuda.Toolkit(tool.library, v, Path(), d))
        cuda._cubin.cache_clear()
        cuda.cubin("k", "text", arch="sm_90")
    assert len(list(cache.iterdir())) == len(compiled) == 6
    assert compiled[1] == ("--gpu-architecture=sm_90", "-std=c++17", "--maxrregcount=32")


def test_threads_may_compile_the_same_at_once(cache: Path, compiled: list[tuple[str, ...]]) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert len(set(pool.map(lambda _: cuda._cubin.__wrapped__("k", "text", (), "sm_90"), range(32)))) == 1
    assert len(list(cache.iterdir())) == 1


def test_a_cache_that_cannot_be_written_is_named_with_the_remedy(
    cache: Path, compiled: list[tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(cuda.os, "replace", full)
        with pytest.raises(InputError, match=r"cannot write the kernel cache .*No space left.* set MAGELLANO_CACHE"):
            cuda.cubin("k", "text", arch="sm_90")
    assert not list(cache.iterdir())
    (tmp_path / "file").touch()
    monkeypatch.setenv("MAGELLANO_CACHE", str(tmp_path / "file"))
    with pytest.raises(InputError, match=r"cannot write the kernel cache .*file.kernels: .*; set MAGELLANO_CACHE"):
        cuda.cubin("k", "text", arch="sm_90")


def test_what_is_missing_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = cuda.toolkit.__wrapped__
    monkeypatch.delenv("MAGELLANO_NVRTC", raising=False)
    monkeypatch.setattr(cuda, "_libraries", lambda: iter([str(tmp_path / "libnvrtc.so.13")]))
    with pytest.raises(InputError, match=r"need NVRTC.*pip install nvidia-cuda-nvrtc, or set CUDA_HOME"):
        find()
    monkeypatch.setattr(cuda, "_library", lambda: ctypes.CDLL(None))
    (tmp_path / "cuda_fp16.h").touch()  # alone is not enough
    monkeypatch.setattr(cuda, "_header_folders", lambda: iter([tmp_path]))
    with pytest.raises(
        InputError, match=r"CUDA headers.*cuda_bf16.h.*pip install nvidia-cuda-runtime, or set CUDA_HOME"
    ):
        find()
    monkeypatch.undo()
    monkeypatch.setenv("MAGELLANO_NVRTC", str(tmp_path / "nvrtc.so"))
    with pytest.raises(InputError, match=r"MAGELLANO_NVRTC=.*nvrtc.so: cannot be loaded as NVRTC"):
        find()


def test_where_nvrtc_and_the_headers_are_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for place in ("site/nvidia/cu13/lib/libnvrtc.so.13", "home/lib64/libnvrtc.so.12", "site/nvidia/cu13/include/x.h",
                  "site/nvidia/cu13/lib/libnvrtc-builtins.so.13.0"):  # fmt: skip
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).touch()
    monkeypatch.setattr(cuda, "_packages", lambda: tmp_path / "site")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    libraries = [path for path in cuda._libraries() if not path.startswith(("/usr/", "/opt/"))]
    ours, theirs = (
        str(tmp_path / f"{p}.so.{n}") for p, n in (("site/nvidia/cu13/lib/libnvrtc", 13), ("home/lib64/libnvrtc", 12))
    )
    by_name = ["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]
    assert [path for path in libraries if path in (ours, theirs, *by_name)] == [ours, *by_name, theirs]
    assert not any("builtins" in path for path in libraries)
    folders = list(cuda._header_folders())
    assert folders == [
        tmp_path / "home/include",
        Path("/usr/local/cuda/include"),
        tmp_path / "site/nvidia/cu13/include",
    ]


@pytest.mark.usefixtures("nvrtc")
def test_nvrtc_compiles_for_the_architecture_asked_for(cache: Path) -> None:
    text = kernel_text("double_it")
    codes = [cuda.cubin("double_it", text, arch=arch) for arch in ("sm_90", "sm_80")]
    assert all(code.startswith(b"\x7fELF") and b".text.double_it\0" in code for code in codes)
    assert codes[0] != codes[1]
    assert len(list(cache.iterdir())) == 2


@pytest.mark.usefixtures("nvrtc")
def test_a_wrong_text_or_option_raises_with_nvrtcs_words(cache: Path) -> None:
    with pytest.raises(KernelBuildError, match=r"kernel k does not compile with NVRTC \S+ \(.*sm_90.*no_such_function"):
        cuda.cubin("k", kernel_text("k", "no_such_function(x_shape[0]);"), arch="sm_90")
    with pytest.raises(KernelBuildError, match="no-such-option"):
        cuda.cubin("k", kernel_text("k"), ["--no-such-option"], arch="sm_90")
    assert not list(cache.iterdir())


@dataclass
class Launches:
    """What MLX was asked to do."""

    precompiled: list[dict[str, Any]]
    by_mlx: list[dict[str, Any]]


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """The CUDA dialect with a compiler that answers "cubin" and an MLX that only writes down what it is told."""
    seen = Launches([], [])

    def precompiled(**how: Any) -> list[mx.array]:
        seen.precompiled.append(how)
        return [mx.zeros(s, t) for s, t in zip(how["output_shapes"], how["output_dtypes"], strict=True)]

    def cuda_kernel(**made: Any) -> Any:
        return lambda **how: seen.by_mlx.append({**made, **how}) or []

    monkeypatch.setattr(launch._mode, "dialect", Dialect.CUDA)
    monkeypatch.setattr(cuda, "cubin", lambda name, text, options, arch: b"cubin")
    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", precompiled)
    monkeypatch.setattr(mx.fast, "cuda_kernel", cuda_kernel)
    return seen


def trial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> Kernel:
    for name, text in (("trial.metal", body), ("cuda.h", ""), ("common.h", "")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(launch, "KERNELS", tmp_path)
    return Kernel("trial", ("s", "x"), ("y",))


def run(kernel: Kernel, x: mx.array, **template: Any) -> list[mx.array]:
    return kernel(
        [mx.array(1.0), x], template={"TX": x.dtype, **template}, grid=(256, 2, 1), threadgroup=(64, 1, 1),
        output_shapes=[x.shape], output_dtypes=[x.dtype],
    )  # fmt: skip


def test_a_launch_hands_over_code_sizes_and_grid(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_cuda: Launches
) -> None:
    kernel = trial(tmp_path, monkeypatch, DOUBLE)
    (y,) = run(kernel, mx.zeros((3, 5), mx.float16))
    assert (y.shape, y.dtype) == ((3, 5), mx.float16)
    (how,) = on_cuda.precompiled
    assert not on_cuda.by_mlx
    assert how["name"].startswith("magellano_trial_")
    assert how["compiled_source"] == b"cubin"
    assert how["scalars"] == [3, 5]  # of x alone: the text does not read s_shape
    assert [a.shape for a in how["inputs"]] == [(1,), (3, 5)]
    assert (how["grid"], how["threadgroup"], how["ensure_row_contiguous"]) == ((256, 2, 1), (64, 1, 1), True)
    assert "init_value" not in how
    with launch.poisoned():
        run(kernel, mx.zeros((3, 5), mx.float16))
    assert on_cuda.precompiled[1]["init_value"] != on_cuda.precompiled[1]["init_value"]  # NaN


def test_a_name_stands_for_one_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_cuda: Launches) -> None:
    kernel = trial(tmp_path, monkeypatch, DOUBLE)
    for x, template in (
        (mx.zeros((3, 5)), {}),
        (mx.zeros((7, 2)), {}),  # other sizes, same code
        (mx.zeros((3, 5, 1)), {}),
        (mx.zeros((3, 5), mx.bfloat16), {}),
        (mx.zeros((3, 5)), {"N": 2}),
    ):
        run(kernel, x, **template)
    run(trial(tmp_path, monkeypatch, DOUBLE + " "), mx.zeros((3, 5)))
    names = [how["name"] for how in on_cuda.precompiled]
    assert names[0] == names[1]
    assert len(set(names)) == 5
    assert on_cuda.precompiled[1]["scalars"] == [7, 2]


def test_a_text_that_reads_strides_goes_to_mlx(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, on_cuda: Launches
) -> None:
    run(trial(tmp_path, monkeypatch, "ST(TX, y, 0, LD(x, x_strides[0] * x_shape[0]));"), mx.zeros((3, 5)))
    assert not on_cuda.precompiled
    (how,) = on_cuda.by_mlx
    assert (how["input_names"], how["ensure_row_contiguous"], how["grid"]) == (["s", "x"], False, (256, 2, 1))


@pytest.mark.skipif(Dialect.CUDA not in launch.available(), reason="no CUDA GPU")
def test_a_gpu_runs_our_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    kernel = trial(tmp_path, monkeypatch, DOUBLE)
    for dtype in (mx.float32, mx.float16, mx.bfloat16):
        x = (mx.arange(15).reshape(5, 3) - 7).astype(dtype).T  # with gaps
        for call in (lambda x: run(kernel, x), mx.compile(lambda x: run(kernel, x))):
            with launch.use(Dialect.CUDA), launch.poisoned():
                assert mx.array_equal(call(x)[0], 2 * x).item()
    assert len(list(cache.iterdir())) == 3
