"""AdamW: a step of a large tensor and of many small ones, against mlx.optimizers.AdamW and the copy bandwidth. As in
training, the host runs ahead: several steps are taken before their results are waited for.
"""

import importlib
from collections.abc import Mapping
from typing import Any

from magellano.backend import mx
from magellano.benchmark import machine
from magellano.names import StateDtype
from magellano.optimizer import AdamW


def _steps(optimizer: Any, shapes: Mapping[str, tuple[int, ...]], dtype: mx.Dtype, count: int) -> tuple[float, int]:
    """Seconds a step, and the bytes that one must move: all read and written once, gradients only read."""
    p = {name: mx.random.normal(shape).astype(dtype) for name, shape in shapes.items()}
    grads = {name: (w * 1e-3).astype(dtype) for name, w in p.items()}
    optimizer.init(p)
    mx.eval(p, grads, optimizer.state)

    def work() -> Any:
        new = p
        for _ in range(count):
            new = optimizer.apply_gradients(grads, new)
        # Ours come with the parameters; reading them here would take them out of the optimiser's hands.
        return new if isinstance(optimizer, AdamW) else (new, optimizer.state)

    size = sum(w.size for w in p.values())
    width = optimizer.dtype.size if isinstance(optimizer, AdamW) else 4
    return machine.seconds(work, 3) / count, size * (3 * dtype.size + 4 * width)


def run() -> dict[str, Any]:
    """Times in ms; `ratio` is to mlx.optimizers.AdamW; the ceiling is the copy bandwidth for that format's bytes."""
    theirs = importlib.import_module("mlx.optimizers").AdamW  # after magellano.backend has prepared the process
    side, steps = machine.pick(2048, 4096), machine.pick(2, 100)
    cases = {
        f"one {side}x{side}": ({"w": (side, side)}, mx.float32, steps),
        f"one {side}x{side}, float16 parameters": ({"w": (side, side)}, mx.float16, steps),
        "256 of 64x1024": ({f"w{i}": (64, 1024) for i in range(256)}, mx.float32, 2),
    }
    copy, table = machine.copy_bandwidth(), []
    for what, (shapes, dtype, count) in cases.items():
        baseline, _ = _steps(theirs(1e-3, bias_correction=True), shapes, dtype, min(count, 10))
        for state in StateDtype:
            ours, moved = _steps(AdamW(1e-3, state=state), shapes, dtype, count)
            table.append(machine.row(f"{what}, {state} states", ours, baseline, moved / ours / copy))
    return {**machine.where(), "copy_gb_s": copy / 1e9, "results": table}
