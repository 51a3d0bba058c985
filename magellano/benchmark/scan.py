"""The selective scan, forward and backward, against its plain-MLX definition and the copy bandwidth.

Sizes on a GPU are those at which mamba-ssm's CUDA kernels were measured: float16, N 16, gate, skip and softplus fused.
`ms` is the device's time of one of many runs in one lazy graph, each of which reads something that the one before
wrote, with the small kernel that makes it; `call_ms` that of a run evaluated by itself, with MLX's launches and
allocations.
"""

from collections.abc import Callable
from typing import Any

from magellano.backend import mx, on_gpu
from magellano.benchmark import machine
from magellano.ops.selective_scan import backward, forward, geometry, reference

N = 16
NAMES = ("x", "dt", "A", "b", "c", "skip", "z", "dt_bias")
GPU_SIZES, CPU_SIZES = ((4, 512, 4096), (1, 16384, 4096)), ((1, 512, 512),)  # B, T, I
MAMBA_SSM_MS = {(4, 512): (0.155, 0.635), (1, 16384): (1.50, 5.31)}  # on an H200
Run = Callable[[mx.array], list[mx.array]]


def inputs(B: int, T: int, I: int, dtype: mx.Dtype) -> tuple[dict[str, mx.array], mx.array]:
    """Seeded inputs as a trained model has them, and a cotangent."""
    mx.random.seed(0)
    normal = mx.random.normal
    A = -mx.arange(1, N + 1).astype(mx.float32) * mx.ones((I, N))
    values = (normal((B, T, I)), 0.5 * normal((B, T, I)), A, normal((B, T, N)), normal((B, T, N)), mx.ones(I),
              normal((B, T, I)), normal((I,)) - 4)  # fmt: skip
    given = {n: v if n in ("A", "skip", "dt_bias") else v.astype(dtype) for n, v in zip(NAMES, values, strict=True)}
    dy = normal((B, T, I)).astype(dtype)
    mx.eval(given, dy)
    return given, dy


@mx.compile
def _after(bias_I: mx.array, made_BTI: mx.array) -> mx.array:
    """The bias itself, but computed from what the run before made. mx.depends would not do: it shares the bias' memory,
    and MLX's CUDA graphs know dependencies by memory, so that runs could overlap.
    """
    return bias_I + 0.0 * made_BTI[0, 0].astype(mx.float32)


def chained(run: Run, bias_I: mx.array, length: int) -> float:
    """Seconds of one run of `length` in one lazy graph, each waiting for the one before; `run` takes dt_bias, and the
    first array that it returns is of x's shape.
    """

    def work() -> list[mx.array]:
        made = run(bias_I)
        for _ in range(length - 1):
            made = run(_after(bias_I, made[0]))
        return made

    return machine.on_device(work) / length


def run() -> dict[str, Any]:
    """Times in ms; `ratio` is to the plain-MLX definition of the forward (on a GPU scaled up from 64 steps), the
    ceiling the copy bandwidth for every input read and every output written once. Parameters are frozen, as in QLoRA.
    """
    dtype, copy, table = (mx.float16 if on_gpu() else mx.float32), machine.copy_bandwidth(), []
    for B, T, I in GPU_SIZES if on_gpu() else CPU_SIZES:
        given, dy = inputs(B, T, I, dtype)
        ahead, back = geometry(B, T, I, N)
        _, _, borders = forward(given, ahead)
        mx.eval(borders)

        def go(bias_I: mx.array, given=given, ahead=ahead) -> list[mx.array]:  # type: ignore[no-untyped-def]
            return forward({**given, "dt_bias": bias_I}, ahead)

        def come(bias_I: mx.array, given=given, back=back, borders=borders, dy=dy) -> list[mx.array]:  # type: ignore[no-untyped-def]
            grads = backward({**given, "dt_bias": bias_I}, borders, dy, None, back, frozen=True)
            return [grads[name] for name in ("x", "dt", "b", "c", "z")]

        steps = min(T, 64) if on_gpu() else T
        short = [a[:, :steps] if a.ndim == 3 else a for a in given.values()]
        plain = machine.seconds(lambda short=short: reference(*short)[0], 1) * T / steps  # type: ignore[misc]
        length = (32 if T < 1024 else 4) if on_gpu() else 1
        for way, work, arrays in (("forward", go, 4), ("backward", come, 7)):
            time = chained(work, given["dt_bias"], length)
            share = B * T * (arrays * I + (2 if arrays == 4 else 4) * N) * dtype.size / time / copy
            call = machine.seconds(lambda work=work, bias_I=given["dt_bias"]: work(bias_I), 10)  # type: ignore[misc]
            more = {"call_ms": call * 1e3}
            if on_gpu():
                more["mamba_ssm_on_h200_ms"] = MAMBA_SSM_MS[B, T][way == "backward"]
            table.append(machine.row(f"{way} {dtype}, B {B} T {T} I {I} N {N}", time, plain, share, **more))
    return {**machine.where(), "copy_gb_s": copy / 1e9, "results": table}
