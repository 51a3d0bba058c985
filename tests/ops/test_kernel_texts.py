"""What can be checked of the kernel texts without a GPU: clang parses each as a Metal kernel, nvcc compiles each as
CUDA, as NVRTC does those that go through it, and all keep to the common subset of kernels/README.md. The texts are
taken as the operations launch them.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from magellano import nf4
from magellano.backend import mx
from magellano.errors import InputError
from magellano.ops import cuda, launch, linear_cross_entropy
from magellano.ops.adamw import Moments, Step, adamw
from magellano.ops.add_rows import add_rows
from magellano.ops.around import Around
from magellano.ops.causal_conv import causal_conv
from magellano.ops.cross_entropy import Renyi
from magellano.ops.decode import conv_step, matvec, nf4_rows
from magellano.ops.experts import Layer, feed_forward
from magellano.ops.host import KERNELS
from magellano.ops.launch import Dialect, Kernel
from magellano.ops.many import add_squares, join, narrow, no_squares
from magellano.ops.moe import places, route
from magellano.ops.nf4 import nf4_matvec
from magellano.ops.selective_scan import selective_scan

STUB = Path(__file__).with_name("metal_stub.h")
CUDA_STUB = """#include <cuda_fp16.h>
#include <cuda_bf16.h>
#include <stdint.h>
struct Shape { int32_t sizes[8]; __device__ int32_t operator[](int i) const { return sizes[i]; } };
struct Strides { int64_t steps[8]; __device__ int64_t operator[](int i) const { return steps[i]; } };
"""
METAL_TYPES = {
    mx.float32: "float",
    mx.float16: "float16_t",
    mx.bfloat16: "bfloat16_t",
    mx.int32: "int",
    mx.bool_: "bool",
}
CUDA_TYPES = {mx.float32: "float", mx.float16: "__half", mx.bfloat16: "__nv_bfloat16", mx.bool_: "bool"}
UINT3 = ("thread_position_in_grid", "thread_position_in_threadgroup", "threadgroup_position_in_grid",
         "threads_per_threadgroup", "threadgroups_per_grid")  # fmt: skip
UINT = ("thread_index_in_threadgroup", "thread_index_in_simdgroup", "simdgroup_index_in_threadgroup")


@dataclass(frozen=True)
class Launch:
    kernel: Kernel
    inputs: tuple[mx.Dtype, ...]
    outputs: tuple[mx.Dtype, ...]
    template: tuple[tuple[str, mx.Dtype | int | bool], ...]


def _name(dtype: mx.Dtype, table: dict[mx.Dtype, str]) -> str:
    return table.get(dtype, str(dtype).removeprefix("mlx.core.") + "_t")


def metal_source(call: Launch) -> str:
    """As MLX writes a custom Metal kernel, with templates as constants and attributes left out."""
    body, lines = call.kernel.body, [launch.Kernel.gpu_header(call.kernel, Dialect.METAL)]
    for name, value in call.template:
        is_type = isinstance(value, mx.Dtype)
        lines.append(
            f"typedef {_name(value, METAL_TYPES)} {name};" if is_type else f"enum : int {{ {name} = {int(value)} }};"
        )
    parameters = []
    for name, dtype in zip(call.kernel.inputs, call.inputs, strict=True):
        parameters.append(f"const device {_name(dtype, METAL_TYPES)}* {name}")
        if f"{name}_shape" in body:
            parameters.append(f"const constant int* {name}_shape")
        if f"{name}_strides" in body:
            parameters.append(f"const constant int64_t* {name}_strides")
    parameters += [
        f"device {_name(d, METAL_TYPES)}* {n}" for n, d in zip(call.kernel.outputs, call.outputs, strict=True)
    ]
    parameters += [f"uint3 {a}" for a in UINT3 if a in body] + [f"uint {a}" for a in UINT if a in body]
    return "\n".join([*lines, f"__kernel void checked({', '.join(parameters)}) {{", body, "}\n"])


def cuda_source(call: Launch) -> str:
    """As MLX writes a custom CUDA kernel, with a stand-in for its headers."""
    body, parameters = call.kernel.body, []
    for name, dtype in zip(call.kernel.inputs, call.inputs, strict=True):
        parameters.append(f"const {_name(dtype, CUDA_TYPES)}* {name}")
        if f"{name}_shape" in body:
            parameters.append(f"const __grid_constant__ Shape {name}_shape")
        if f"{name}_strides" in body:
            parameters.append(f"const __grid_constant__ Strides {name}_strides")
    parameters += [f"{_name(d, CUDA_TYPES)}* {n}" for n, d in zip(call.kernel.outputs, call.outputs, strict=True)]
    constants = [
        f"using {n} = {_name(v, CUDA_TYPES)};" if isinstance(v, mx.Dtype) else f"constexpr int {n} = {int(v)};"
        for n, v in call.template
    ]
    header = CUDA_STUB + launch.Kernel.gpu_header(call.kernel, Dialect.CUDA)
    signature = f"__global__ void checked({', '.join(parameters)}) {{"
    return "\n".join([header, "namespace mlx::core::cu {", signature, *constants, body, "}", "}\n"])


@pytest.fixture(scope="module")
def launches() -> Iterator[list[Launch]]:
    """Every distinct launch that the operations make with the GPU's geometry, forward and backward."""
    if Dialect.HOST not in launch.available():
        pytest.skip("the host dialect, which shows the launches, cannot run here")
    seen: dict[Launch, None] = {}
    original = Kernel._run_on_host

    def record(kernel: Kernel, inputs, template, grid, threadgroup, shapes, dtypes, *rest):  # type: ignore[no-untyped-def]
        call = Launch(kernel, tuple(a.dtype for a in inputs), tuple(dtypes), tuple(sorted(template.items())))
        seen[call] = None
        return original(kernel, inputs, template, grid, threadgroup, shapes, dtypes, *rest)

    with pytest.MonkeyPatch.context() as patch, launch.on_fibers():
        patch.setattr(Kernel, "_run_on_host", record)
        for dtype in (mx.float32, mx.bfloat16):
            _use_operations(dtype)
        yield list(seen)


def _use_operations(dtype: mx.Dtype) -> None:
    def ones(*shape: int) -> mx.array:
        return mx.ones(shape, dtype)

    def scan(x: mx.array, parameter: mx.array) -> mx.array:
        y, state = selective_scan(
            x, x, -parameter, ones(1, 9, 16), ones(1, 9, 16), parameter[:, 0], x, parameter[:, 0], mx.zeros((1, 9)),
            mx.ones((1, 8, 16)), return_state=True,
        )  # fmt: skip
        return y.astype(mx.float32).sum() + state.sum()

    def convolve(x: mx.array, parameter: mx.array) -> mx.array:
        y = causal_conv(x, parameter[:, :4], parameter[:, 0], mx.zeros((1, 9)), ones(1, 3, 8))
        assert isinstance(y, mx.array)
        return y.astype(mx.float32).sum()

    for function in (scan, convolve):
        mx.eval(mx.grad(function, argnums=(0, 1))(ones(1, 9, 8), mx.ones((8, 16))))
    _use_experts_and_loss(dtype)
    stack = nf4.NF4Stack.of([nf4.quantize(ones(8, 64).astype(mx.float32)) for _ in range(2)])
    mx.eval(stack.dequantize(dtype), stack[0].dequantize(dtype), next(iter(stack[0].slices(dtype)))[2])
    mx.eval(
        nf4_matvec(ones(1, 64), stack[0].parts, 8), nf4_matvec(ones(1, 64), stack.parts, 8, mx.zeros((1,), mx.int32))
    )
    _use_decoding(dtype)
    mx.eval(add_rows(ones(5, 8), ones(3, 8), mx.zeros((3,), mx.int32)))
    mx.eval(add_squares(no_squares(), [ones(3, 8), ones(8)]), join([ones(8)] * 9))
    mx.eval(narrow([mx.ones((2, 8))] * 3, dtype, (1, 0)), narrow([mx.ones((2, 3))], dtype, (1, 0)))
    for state in (mx.float32, mx.float16):
        for size in (8 * 256, 9):
            moments = Moments(*(mx.zeros((size,), state) for _ in range(3)))
            mx.eval(adamw(ones(size), ones(size), moments, Step(1, 1e-3, 0.9, 0.999, 1e-8, 0.1))[0])
    mx.eval(selective_scan(ones(1, 1, 8), ones(1, 1, 8), -mx.ones((8, 16)), ones(1, 1, 16), ones(1, 1, 16)))


def _use_experts_and_loss(dtype: mx.Dtype) -> None:
    def experts(u: mx.array, logits: mx.array) -> mx.array:
        routing = route(logits, 2)
        at = places(routing)
        y = feed_forward(u, routing.gate_Mk, at, Layer(mx.ones((4, 8, 8), dtype)), Layer(mx.ones((4, 8, 8), dtype)))
        return y.astype(mx.float32).sum()

    def loss(x: mx.array, renyi: Renyi | None) -> mx.array:
        target, weight = mx.zeros((3,), mx.int32), mx.ones((3,))
        return linear_cross_entropy(x, mx.ones((7, 8), dtype), target, weight, frozen=True, renyi=renyi)

    x = mx.ones((3, 8), dtype)
    mx.eval(mx.grad(experts, argnums=(0, 1))(x, mx.ones((3, 4))))
    for renyi in (None, Renyi(1.0, 0.1), Renyi(2.0, 0.1)):
        mx.eval(mx.grad(lambda x, renyi=renyi: loss(x, renyi))(x))


def _use_decoding(dtype: mx.Dtype) -> None:
    def ones(*shape: int) -> mx.array:
        return mx.ones(shape, dtype)

    q = nf4.quantize(mx.ones((40, 256)))
    for rows in (1, 2, 3):
        low = matvec(ones(rows, 256), mx.ones((5, 256)), None, Around(mx.ones((256,)), 1e-5), mx.float32)
        around = Around(mx.ones((256,)), 1e-5, low, mx.ones((40, 5)), 2.0, relu=True, residual_MO=ones(rows, 40))
        mx.eval(nf4_matvec(ones(rows, 256), q.parts, 40, None, around), nf4_matvec(ones(rows, 256), q.parts, 40))
        mx.eval(matvec(ones(rows, 256), ones(40, 256), None, around))
    stack, expert = nf4.NF4Stack.of([q, q]), mx.array([0, 1])
    mx.eval(nf4_matvec(ones(1, 256), stack.parts, 40, expert), matvec(ones(1, 256), mx.ones((2, 40, 256)), expert))
    mx.eval(conv_step(ones(2, 140), mx.ones((70, 4)), mx.ones((70,)), ones(2, 3, 70)))
    mx.eval(nf4_rows(mx.array([3]), q.parts, 256, dtype, mx.ones((5, 256)), mx.ones((40, 5)), 2.0))


def test_the_launches_cover_both_directions(launches: list[Launch]) -> None:
    names = {call.kernel.name for call in launches}
    wanted = {f"{op}_{way}" for op in ("selective_scan", "causal_conv") for way in ("forward", "backward")}
    wanted |= {f"moe_{part}" for part in ("route", "places", "rows", "hidden_backward")}
    wanted |= {f"cross_entropy_{part}" for part in ("statistics", "entropy", "gradient")}
    wanted |= {"add_rows"} | {f"nf4_{part}" for part in ("quantize", "dequantize", "matvec", "rows")}
    wanted |= {"matvec", "conv_step"} | {f"many_{part}" for part in ("squares", "join", "narrow")}
    wanted |= {"adamw_fp32", "adamw_fp16_v2", "adamw_fp16_simd8"}
    assert wanted <= names


def clang_errors(text: str) -> list[str]:
    """What clang's front end says of a Metal text as "C++ for OpenCL"; through libclang, which a lock can install."""
    from clang import cindex

    source = f'#include "{STUB}"\n{text}'
    arguments = ["-x", "cl", "-cl-std=clc++", "-cl-no-stdinc", "-Wall", "-Wno-unused", "-Wno-unknown-pragmas"]
    parsed = cindex.Index.create().parse("text.cl", arguments, unsaved_files=[("text.cl", source)])
    return [str(d) for d in parsed.diagnostics if d.severity >= cindex.Diagnostic.Warning]


def test_clang_accepts_the_metal_texts(launches: list[Launch]) -> None:
    for call in launches:
        assert not clang_errors(metal_source(call)), f"{call.kernel.name} {call.template}"


def test_clang_would_refuse_a_wrong_text(launches: list[Launch]) -> None:
    good = metal_source(next(call for call in launches if call.kernel.name == "selective_scan_forward"))
    for change in (
        ("threadgroup int fresh[TC];", "if (HAS_Z) { threadgroup int fresh[TC]; }"),
        ("k_softplus(raw)", "softplus(raw)"),
    ):
        assert change[0] in good
        assert clang_errors(good.replace(*change)), change


def test_nvcc_compiles_the_cuda_texts(launches: list[Launch], tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc here")

    def compiled(number: int) -> subprocess.CompletedProcess[str]:
        path = tmp_path / f"{launches[number].kernel.name}-{number}.cu"
        path.write_text(cuda_source(launches[number]))
        command = [nvcc, "-std=c++17", "-arch=sm_90", "-cubin", "-Xptxas", "-v", path, "-o", path.with_suffix(".cubin")]
        return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # not all at once: they would starve the tests beside them
        for call, done in zip(launches, pool.map(compiled, range(len(launches))), strict=True):
            said = done.stdout
            assert done.returncode == 0, f"{call.kernel.name} {call.template}\n{said}"
            spilled = re.search(r"(\d+) bytes spill stores", said)
            assert spilled, said
            assert int(spilled[1]) == 0, f"{call.kernel.name} {call.template} spills registers\n{said}"


def test_nvrtc_compiles_the_texts_without_strides(
    launches: list[Launch], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try:
        cuda.toolkit()
    except InputError as e:  # MAGELLANO_NVRTC and CUDA_HOME may point at them
        pytest.skip(str(e))
    monkeypatch.setenv("MAGELLANO_CACHE", str(tmp_path))
    ours = [call for call in launches if not call.kernel.strided]
    by_mlx = {call.kernel.name for call in launches} - {call.kernel.name for call in ours}
    assert by_mlx == {f"{op}_{way}" for op in ("selective_scan", "causal_conv") for way in ("forward", "backward")}

    def compiled(call: Launch) -> bytes:
        k = call.kernel
        inputs, outputs = dict(zip(k.inputs, call.inputs, strict=True)), dict(zip(k.outputs, call.outputs, strict=True))
        dimensions = {n: 4 for n in k.inputs if f"{n}_shape" in k.body}
        name = f"magellano_{k.name}"
        text = cuda.source(name, k.body, k.header, inputs, outputs, dict(call.template), dimensions)
        return cuda.cubin(name, text, arch="sm_90")

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for call, code in zip(ours, pool.map(compiled, ours), strict=True):
            assert f".text.magellano_{call.kernel.name}\0".encode() in code, f"{call.kernel.name} {call.template}"


@pytest.mark.parametrize("path", sorted(KERNELS.glob("*.metal")), ids=lambda p: p.stem)
def test_texts_keep_to_the_common_subset(path: Path) -> None:
    text = re.sub(r"//.*", "", path.read_text())
    for word in (
        r"\bdevice\b",
        r"\bconstant\b",
        r"\bthread\b",
        r"\batomic",
        r"\bdouble\b",
        r"#\s*include",
        r"\bmetal::",
        r"__",
    ):
        assert not re.search(word, text), f"{path.name}: {word} is outside the common subset"
