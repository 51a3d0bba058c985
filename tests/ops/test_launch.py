"""The launcher: which dialect, why, and what happens to the kernels it builds."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from magellano.backend import mx
from magellano.errors import InputError
from magellano.ops import host, launch
from magellano.ops.host import Template
from magellano.ops.launch import Dialect, Kernel

needs_host = pytest.mark.skipif(
    Dialect.HOST not in launch.available(), reason="no C++ compiler, or a GPU is the device"
)
DOUBLE = """const uint first = thread_position_in_grid.x * CPT, size = x_shape[0];
const uint end = first + CPT < size ? first + CPT : size;
LANES for (uint i = first; i < end; ++i) ST(TX, y, i, 2.0f * LD(x, i));"""


def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, inputs: tuple[str, ...] = ("x",)) -> Kernel:
    (tmp_path / "trial.metal").write_text(body)
    monkeypatch.setattr(launch, "KERNELS", tmp_path)
    monkeypatch.setenv("MAGELLANO_CACHE", str(tmp_path / "cache"))
    host.build.cache_clear()
    return Kernel("trial", inputs, ("y",))


def double(k: Kernel, x: mx.array, channels: int = 16) -> mx.array:
    return k(
        [x], template={"TX": x.dtype, "CPT": 1}, grid=(-(-x.size // 64) * 64, 1, 1), threadgroup=(64, 1, 1),
        host_template={"CPT": channels}, host_grid=(-(-x.size // channels), 1, 1),
        output_shapes=[x.shape], output_dtypes=[x.dtype],
    )[0]  # fmt: skip


def once(k: Kernel, inputs: list[mx.array], template: Template, threads: int, size: int) -> mx.array:
    """One threadgroup of `threads`, or groups of them up to `size`, one output of `size` elements of type TX."""
    dtype = template["TX"]
    assert isinstance(dtype, mx.Dtype)
    shapes, group = [(size,)], (threads, 1, 1)
    return k(
        inputs, template=template, grid=(size, 1, 1), threadgroup=group, output_shapes=shapes, output_dtypes=[dtype]
    )[0]


def in_new_process(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def test_the_choice_is_one_that_can_run_and_has_a_reason() -> None:
    assert launch.dialect() in launch.available()
    assert launch.why()


def test_use_overrides_and_restores() -> None:
    before = launch.dialect()
    with launch.use(Dialect.REFERENCE):
        assert launch.dialect() is Dialect.REFERENCE
        assert launch.why() == "chosen by launch.use"
    assert launch.dialect() is before
    with pytest.raises(InputError, match="unknown dialect 'opencl'"), launch.use("opencl"):
        pass
    absent = next(d for d in Dialect if d not in launch.available())
    with pytest.raises(InputError, match="cannot run here"), launch.use(absent):
        pass


def test_the_environment_overrides() -> None:
    code = "from magellano.ops import launch; print(launch.dialect(), launch.why())"
    assert in_new_process(code, MAGELLANO_DIALECT="reference").stdout == "reference MAGELLANO_DIALECT says so\n"
    wrong = in_new_process(code, MAGELLANO_DIALECT="cpu").stderr
    assert "InputError: MAGELLANO_DIALECT=cpu: unknown dialect; one of reference, host, cuda, metal" in wrong


@needs_host
def test_without_a_compiler_it_warns_and_says_what_that_costs() -> None:
    code = "from magellano.ops import launch; print(launch.dialect())"
    done = in_new_process(code, PATH="/nowhere", CXX="")
    assert done.stdout == "reference\n", done.stderr
    assert "60 to 190 times slower" in done.stderr


@needs_host
@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.int32])
@pytest.mark.parametrize("size", [1, 7, 64, 1003])
def test_a_kernel_runs_in_both_geometries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: mx.Dtype, size: int
) -> None:
    k = kernel(tmp_path, monkeypatch, DOUBLE)
    x = (mx.arange(size) - 3).astype(dtype)
    for geometry in (launch.use("host"), launch.on_fibers()):
        with geometry, launch.poisoned():
            assert mx.array_equal(double(k, x), 2 * x).item()


@needs_host
def test_16_bit_rounding_is_mlxs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spread = np.random.default_rng(0).standard_normal(4096) * 10.0 ** np.arange(-8, 8).repeat(256)
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 65519.0, 65520.0, 6e-8, 2.9e-8]
    x = mx.array(np.concatenate([spread, special]).astype(np.float32))
    k = kernel(tmp_path, monkeypatch, DOUBLE.replace("2.0f * ", ""))
    with launch.use("host"):
        for dtype in (mx.float16, mx.bfloat16):
            y = once(k, [x], {"TX": dtype, "CPT": 1}, 1, x.size)
            assert mx.array_equal(y, x.astype(dtype), equal_nan=True).item()


@needs_host
def test_an_element_that_no_thread_writes_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    k = kernel(tmp_path, monkeypatch, DOUBLE.replace("uint i = first", "uint i = first + 1"))
    with launch.use("host"), launch.poisoned():
        assert mx.isnan(double(k, mx.ones(32))).sum().item() == 2


@needs_host
def test_fibers_find_a_barrier_that_some_threads_miss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    k = kernel(tmp_path, monkeypatch, "if (thread_index_in_threadgroup < 32) { TGBARRIER; }\n" + DOUBLE)
    with launch.on_fibers(), pytest.raises(RuntimeError, match="not every thread reaches the barrier"):
        double(k, mx.ones(64))


@needs_host
def test_fibers_shuffle_and_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    body = """threadgroup float total[SIMD_W];
const uint l = thread_index_in_threadgroup, i = thread_position_in_grid.x;
const float sum = SIMD_SUM(LD(x, i)), other = SIMD_XOR(LD(x, i), 1);
if (thread_index_in_simdgroup == 0) total[simdgroup_index_in_threadgroup] = sum;
TGBARRIER;
ST(TX, y, i, total[1 - l / SIMD_W] + 1000.0f * other);"""
    k = kernel(tmp_path, monkeypatch, body)
    x = mx.arange(128).astype(mx.float32)
    with launch.on_fibers():
        y = once(k, [x], {"TX": mx.float32}, 64, 128)
    values = np.arange(128)
    sums = values.reshape(2, 2, 32).sum(-1)[:, ::-1].repeat(32)
    np.testing.assert_array_equal(np.array(y), sums + 1000.0 * (values ^ 1))


@needs_host
def test_small_and_scalar_inputs_are_padded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def record(self: Kernel, inputs: list[mx.array], *rest: object) -> list[mx.array]:
        seen.append([a.shape for a in inputs])
        return inputs

    monkeypatch.setattr(Kernel, "_run_on_host", record)
    k = kernel(tmp_path, monkeypatch, "ST(TX, y, x_shape[0], LD(s, 0) + LD(t, 2));", ("x", "s", "t"))
    with launch.use("host"):
        once(k, [mx.zeros(3), mx.array(1.0), mx.zeros((1, 3))], {"TX": mx.float32}, 1, 1)
    assert seen == [[(3,), (8,), (8,)]]  # x keeps its shape because the text reads it


@needs_host
def test_a_wrong_text_raises_with_the_compilers_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    k = kernel(tmp_path, monkeypatch, "no_such_function(x_shape[0]);")
    with launch.use("host"), pytest.raises(host.KernelBuildError, match="no_such_function"):
        double(k, mx.ones(32))
    assert not list((tmp_path / "cache").rglob("*.so"))


@needs_host
def test_the_cache_is_used_and_keyed_by_the_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def built() -> list[Path]:
        return sorted((tmp_path / "cache" / "kernels").iterdir())

    with launch.use("host"):
        double(kernel(tmp_path, monkeypatch, DOUBLE), mx.ones(32))
        first = built()
        monkeypatch.setattr(host.subprocess, "run", lambda *a, **k: pytest.fail("compiled again"))
        double(kernel(tmp_path, monkeypatch, DOUBLE), mx.ones(32))
        monkeypatch.undo()
        double(kernel(tmp_path, monkeypatch, DOUBLE.replace("2.0f", "3.0f")), mx.ones(32))
    assert len(first) == 1
    assert len(built()) == 2


@needs_host
def test_inside_compile_it_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    k = kernel(tmp_path, monkeypatch, DOUBLE)
    with launch.use("host"):
        for transform in (mx.compile, mx.vmap):
            with pytest.raises(launch.TracedError, match=r"trial: .* call it outside, or under .*REFERENCE"):
                transform(lambda x: double(k, x))(mx.ones((4, 32)))


@needs_host
def test_loading_kernels_leaves_subnormals_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with launch.use("host"):
        double(kernel(tmp_path, monkeypatch, DOUBLE), mx.ones(32))
    assert (np.array([1e-39], np.float32) * np.float32(1)).item() != 0
