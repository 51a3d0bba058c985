"""AdamW: a step of a large tensor and of many small ones, against mlx.optimizers.AdamW and the copy bandwidth; torch's
AdamW beside it where torch is installed. As in training, steps are handed to the device as they are taken, and the host
runs ahead: several steps are taken before their results are waited for. `device_ms`: without the host's part.
"""

import importlib
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from magellano.backend import mx, on_gpu
from magellano.benchmark import machine
from magellano.names import StateDtype
from magellano.optimizer import AdamW

_ITERATIONS = 100  # of the figure in seconds
_AT_ONCE = 4  # steps that are handed to the device together


def _steps(
    optimizer: Any, shapes: Mapping[str, tuple[int, ...]], dtype: mx.Dtype, count: int
) -> tuple[float, float, int]:
    """Seconds a step, those of the device alone, and the bytes that one must move: all read and written once, gradients
    only read.
    """
    ours = isinstance(optimizer, AdamW)
    p = {name: mx.random.normal(shape).astype(dtype) for name, shape in shapes.items()}
    grads = {name: (w * 1e-3).astype(dtype) for name, w in p.items()}
    optimizer.init(p)
    mx.eval(p, grads, optimizer.state)

    def work(steps: int = count) -> Any:
        new = p
        for step in range(1, steps + 1):
            new = optimizer.apply_gradients(grads, new)
            if step % _AT_ONCE == 0 or step == steps:
                # Ours come with the parameters; reading them here would take them out of the optimiser's hands.
                made = new if ours else (new, optimizer.state)
                mx.async_eval(made)
        return made

    size = sum(w.size for w in p.values())
    width = optimizer.dtype.size if ours else 4
    few = min(count, 2 * _AT_ONCE)  # the host cannot get further ahead
    alone = machine.on_device(lambda: work(few)) / few if ours and on_gpu() else 0.0
    return machine.seconds(work, 3) / count, alone, size * (3 * dtype.size + 4 * width)


def _torch(side: int, device: str, steps: int) -> float:
    """Seconds that torch.optim.AdamW takes for 100 steps of side x side: float16 and fused on CUDA, float32 on the CPU,
    where fewer steps are timed and scaled up.
    """
    torch = importlib.import_module("torch")
    cuda = device == "cuda"
    w = torch.randn(side, side, device=device, dtype=torch.float16 if cuda else torch.float32, requires_grad=True)
    w.grad = w.detach() * 1e-3
    optimizer = torch.optim.AdamW([w], 1e-3, **({"fused": True} if cuda else {}))
    wait: Callable[[], None] = torch.cuda.synchronize if cuda else lambda: None
    best = float("inf")
    for _ in range(4):  # the first warms up
        wait()
        started = time.perf_counter()
        for _ in range(steps):
            optimizer.step()
        wait()
        best = min(best, time.perf_counter() - started)
    return best * _ITERATIONS / steps


def peers(side: int) -> dict[str, float | str]:
    """Seconds for 100 iterations of side x side in torch, or why not."""
    if find_spec("torch") is None:
        return {"torch": "not installed here"}
    torch = importlib.import_module("torch")
    found: dict[str, float | str] = {
        f"torch float32, CPU ({torch.get_num_threads()} threads)": _torch(side, "cpu", machine.pick(2, 10))
    }
    fused = "torch float16, CUDA, fused"
    found[fused] = _torch(side, "cuda", _ITERATIONS) if torch.cuda.is_available() else "no CUDA device for torch here"
    return found


def run() -> dict[str, Any]:
    """Times in ms; `ratio` is to mlx.optimizers.AdamW; the ceiling is the copy bandwidth for that format's bytes."""
    theirs = importlib.import_module("mlx.optimizers").AdamW  # after magellano.backend has prepared the process
    side, steps = machine.pick(2048, 4096), machine.pick(2, _ITERATIONS)
    float16 = f"one {side}x{side}, float16 parameters"
    cases = {
        f"one {side}x{side}": ({"w": (side, side)}, mx.float32, steps),
        float16: ({"w": (side, side)}, mx.float16, steps),
        "256 of 64x1024": ({f"w{i}": (64, 1024) for i in range(256)}, mx.float32, 2),
    }
    copy, table, hundred = machine.copy_bandwidth(), [], 0.0
    for what, (shapes, dtype, count) in cases.items():
        baseline, _, _ = _steps(theirs(1e-3, bias_correction=True), shapes, dtype, min(count, 10))
        for state in StateDtype:
            ours, alone, moved = _steps(AdamW(1e-3, state=state), shapes, dtype, count)
            more = {"device_ms": alone * 1e3, "device_share": moved / alone / copy} if alone else {}
            table.append(machine.row(f"{what}, {state} states", ours, baseline, moved / ours / copy, **more))
            if what == float16 and state is StateDtype.FLOAT16:
                hundred = ours * _ITERATIONS
    return {
        **machine.where(),
        "copy_gb_s": copy / 1e9,
        "results": table,
        f"seconds for {_ITERATIONS} iterations, {side}x{side}": {"magellano float16": hundred, **peers(side)},
    }
