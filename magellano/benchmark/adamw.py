"""AdamW: one step of a large tensor and of many small ones, against mlx.optimizers.AdamW and the copy bandwidth."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from magellano.backend import mx
from magellano.benchmark import machine
from magellano.names import StateDtype
from magellano.optimizer import AdamW


def _stepper(optimizer: Any, shapes: Mapping[str, tuple[int, ...]]) -> tuple[Callable[[], Any], int]:
    """A function that takes a step, and the bytes that it must move: all read and written once, gradients only read."""
    held = {"p": {name: mx.random.normal(shape) for name, shape in shapes.items()}}
    grads = {name: w * 1e-3 for name, w in held["p"].items()}
    optimizer.init(held["p"])
    mx.eval(held, grads, optimizer.state)

    def step() -> Any:
        held["p"] = optimizer.apply_gradients(grads, held["p"])
        return held["p"], optimizer.state

    size = sum(w.size for w in held["p"].values())
    width = optimizer.dtype.size if isinstance(optimizer, AdamW) else 4
    return step, size * (4 + 2 * (4 + 2 * width))


def run() -> dict[str, Any]:
    """Times in ms; `ratio` is to mlx.optimizers.AdamW; the ceiling is the copy bandwidth for that format's bytes."""
    theirs = importlib.import_module("mlx.optimizers").AdamW  # after magellano.backend has prepared the process
    side = 4096
    cases = {
        f"one {side}x{side}": {"w": (side, side)},
        "256 of 64x1024": {f"w{i}": (64, 1024) for i in range(256)},
    }
    copy, table = machine.copy_bandwidth(), []
    for what, shapes in cases.items():
        baseline = machine.seconds(_stepper(theirs(1e-3, bias_correction=True), shapes)[0], 3)
        for state in StateDtype:
            step, moved = _stepper(AdamW(1e-3, state=state), shapes)
            ours = machine.seconds(step)
            table.append(machine.row(f"{what}, {state} states", ours, baseline, moved / ours / copy))
    return {**machine.where(), "copy_gb_s": copy / 1e9, "results": table}
