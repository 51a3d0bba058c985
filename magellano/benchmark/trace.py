"""Where a training step's time and memory go. One step is taken with a wait after every layer's function, so that each
is timed and its peak seen alone; scan, convolution and making weights dense are timed by themselves at the step's
shapes, and what a layer takes beside them is its products. The waits make such a step longer than a free one, and
layers are made again even where a CPU would keep their activations: shares are what counts.

Shapes: B batch, T time, I d_inner, N d_state, K d_conv.
"""

import time
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

from magellano.backend import mx
from magellano.benchmark import machine
from magellano.layout import SMALL_WEIGHT, layer_parameters, parameters
from magellano.names import LayerKind, LoraTarget
from magellano.nf4 import NF4Stack, NF4Tensor
from magellano.ops import causal_conv, selective_scan
from magellano.profile import Profile
from magellano.trainer import Trainer

UNREAD = (LoraTarget.OUT_PROJ, LoraTarget.W2)  # made dense once less: what they make is not needed again


class _Clock:
    """Milliseconds and peak bytes by part."""

    def __init__(self) -> None:
        self.ms: dict[str, float] = {}
        self.peak: dict[str, int] = {}

    @contextmanager
    def part(self, name: str):  # type: ignore[no-untyped-def]
        mx.synchronize()
        before, started = mx.get_active_memory(), time.perf_counter()
        mx.reset_peak_memory()
        yield
        mx.synchronize()
        self.ms[name] = self.ms.get(name, 0.0) + (time.perf_counter() - started) * 1e3
        self.peak[name] = max(self.peak.get(name, 0), mx.get_peak_memory() - before)


def trace(trainer: Trainer, profile: Profile) -> list[dict[str, Any]]:
    """A row for each part: ms, share of the step, and the most memory it needs beside what is held, in MB; the largest
    first. `trainer` has taken steps already.
    """
    clock, backprop, optimizer = _Clock(), trainer.backprop, trainer.optimizer
    run, consume, evaluate = backprop._run, optimizer.consume, optimizer.evaluate

    def timed_run(function: Callable[..., Any], i: int | None, *arrays: mx.array) -> Any:
        kind = profile.model.kind(i) if i is not None else function.__name__
        with clock.part({"_embed": "embedding", "_loss": "head and loss"}.get(kind, kind)):
            made = run(function, i, *arrays)
            mx.eval(made)
        return made

    def timed(work: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **more: Any) -> None:
            with clock.part("optimiser"):
                work(*args, **more)

        return call

    keeps, backprop.keeps = backprop.keeps, False
    backprop._run = timed_run  # type: ignore[method-assign]
    optimizer.consume, optimizer.evaluate = timed(consume), timed(evaluate)  # type: ignore[method-assign]
    try:
        started = time.perf_counter()
        trainer.one_step()
        total = (time.perf_counter() - started) * 1e3
    finally:
        backprop._run, backprop.keeps = run, keeps  # type: ignore[method-assign]
        optimizer.consume, optimizer.evaluate = consume, evaluate  # type: ignore[method-assign]
    return _rows(clock, _alone(trainer, profile), total)


def _rows(clock: _Clock, alone: dict[str, float], total: float) -> list[dict[str, Any]]:
    layers = {kind: clock.ms.pop(kind, 0.0) for kind in LayerKind}
    peaks = {kind: clock.peak.pop(kind, 0) for kind in LayerKind}
    ms = {
        **clock.ms,
        "scan": alone["scan"],
        "convolution": alone["convolution"],
        "projections": layers[LayerKind.MAMBA] - alone["scan"] - alone["convolution"] - alone["dense mamba"],
        "experts": layers[LayerKind.MOE] - alone["dense moe"],
        "dequantisation": alone["dense mamba"] + alone["dense moe"],
        "host and the rest": total - sum(clock.ms.values()) - sum(layers.values()),
    }
    peak = {**clock.peak, "projections": peaks[LayerKind.MAMBA], "experts": peaks[LayerKind.MOE]}
    rows = [
        {"part": part, "ms": value, "share": value / total, **({"extra_mb": peak[part] / 1e6} if part in peak else {})}
        for part, value in ms.items()
    ]
    return sorted(rows, key=lambda row: -row["ms"])


def _alone(trainer: Trainer, profile: Profile) -> dict[str, float]:
    """Milliseconds a step of what is timed by itself: forward twice and backward, times the layers."""
    m, train = profile.model, profile.train
    mamba = sum(m.kind(i) is LayerKind.MAMBA for i in range(m.n_layers)) * train.accumulate
    scan, convolution = _kernels(trainer, profile)
    dense = {kind: _dense(trainer, profile, kind) * 1e3 * train.accumulate for kind in LayerKind}
    return {
        "scan": scan * 1e3 * mamba,
        "convolution": convolution * 1e3 * mamba,
        **{f"dense {kind}": value for kind, value in dense.items()},
    }


def _kernels(trainer: Trainer, profile: Profile) -> tuple[float, float]:
    """Seconds of one layer's scan and convolution, forward, again and backward."""
    m, B, T, dtype = profile.model, profile.train.batch, profile.data.seq_len, trainer.model.compute
    x, dt, z = (mx.random.normal((B, T, m.d_inner)).astype(dtype) for _ in range(3))
    b, c = (mx.random.normal((B, T, m.d_state)).astype(dtype) for _ in range(2))
    A, skip, bias = -mx.ones((m.d_inner, m.d_state)), mx.ones((m.d_inner,)), mx.zeros((m.d_inner,))
    weight, reset = mx.ones((m.d_inner, m.d_conv)), mx.zeros((B, T), dtype=mx.uint8)
    mx.eval(x, dt, z, b, c, A, skip, bias, weight, reset)

    def scan(x: mx.array, dt: mx.array, b: mx.array, c: mx.array, z: mx.array) -> mx.array:
        y = selective_scan(x, dt, A, b, c, skip, z, bias, reset, frozen_parameters=True)
        assert isinstance(y, mx.array)
        return y

    def convolve(x: mx.array) -> mx.array:
        y = causal_conv(x, weight, bias, reset, frozen_parameters=True)
        assert isinstance(y, mx.array)
        return y

    def both(function: Callable[..., mx.array], *given: mx.array) -> float:
        forward = machine.seconds(lambda: function(*given), 3)
        return forward + machine.seconds(lambda: mx.vjp(function, list(given), [x]), 3)

    return both(scan, x, dt, b, c, z), both(convolve, x)


def _dense(trainer: Trainer, profile: Profile, kind: LayerKind) -> float:
    """Seconds a step of making the weights of all layers of one kind dense."""
    m = profile.model
    layers = [i for i in range(m.n_layers) if m.kind(i) is kind]
    if not layers:
        return 0.0
    total = 0.0
    for spec in layer_parameters(m, layers[0]):
        if spec.target is None or (len(spec.shape) == 2 and spec.size <= SMALL_WEIGHT):
            continue
        weight = _module(trainer, spec.name).base
        if isinstance(weight, NF4Tensor | NF4Stack):
            dtype = trainer.model.compute
            passes = 3 - (spec.target in UNREAD)
            total += passes * machine.seconds(lambda w=weight, d=dtype: w.dequantize(d), 3)  # type: ignore[misc]
    return total * len(layers)


def _module(trainer: Trainer, name: str) -> Any:
    assert name in {spec.name for spec in parameters(trainer.model.config)}, name
    found: Any = trainer.model
    for step in name.split(".")[:-1]:
        found = found[int(step)] if step.isdigit() else getattr(found, step)
    return found
