"""AdamW over a tree of parameters, used as mlx.optimizers are; learning-rate schedule; clipping by the global norm."""

import math
import zlib
from collections.abc import Callable
from typing import Any

from magellano.backend import mx, nn, tree_flatten, tree_map, tree_unflatten
from magellano.names import StateDtype
from magellano.ops.adamw import Moments, Step, adamw, hash_u32, numbers

STEP = "step"


def _flat(tree: Any) -> list[tuple[str, mx.array]]:
    return list(tree_flatten(tree))  # type: ignore[arg-type]


class AdamW:
    """AdamW with decoupled weight decay, optional AMSGrad, float32 or float16 states (see magellano/ops/adamw.py).

    `decays(name)` says which parameters weight decay touches; by default all. The stochastic rounding of float16
    states depends on (seed, step, parameter's name) alone. `state` is one flat dict: "step", and for each parameter
    NAME.m, NAME.s and, with AMSGrad, NAME.peak; it can be set from any tree that flattens to these names.
    """

    def __init__(
        self,
        learning_rate: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        state: StateDtype = StateDtype.FLOAT32,
        seed: int = 0,
        *,
        amsgrad: bool = False,
        decays: Callable[[str], bool] = lambda name: True,
    ):
        self.learning_rate, self.betas, self.eps, self.weight_decay = learning_rate, betas, eps, weight_decay
        self.dtype = {StateDtype.FLOAT32: mx.float32, StateDtype.FLOAT16: mx.float16}[StateDtype(state)]
        self.seed, self.amsgrad, self.decays = seed, amsgrad, decays
        self._state: dict[str, mx.array] = {STEP: mx.array(0, dtype=mx.uint32)}

    @property
    def state(self) -> dict[str, mx.array]:
        return self._state

    @state.setter
    def state(self, tree: Any) -> None:
        self._state = dict(_flat(tree))

    @property
    def step(self) -> mx.array:
        """Steps taken, uint32."""
        return self._state[STEP]

    def init(self, parameters: Any) -> None:
        """Zero states for every array of the tree `parameters`."""
        parts = ("m", "s", "peak") if self.amsgrad else ("m", "s")
        for name, value in _flat(parameters):
            for part in parts:
                self._state[f"{name}.{part}"] = mx.zeros(value.shape, self.dtype)

    def update(self, model: nn.Module, gradients: Any, learning_rate: float | mx.array | None = None) -> None:
        """Take a step: `model`'s parameters that have gradients are replaced."""
        model.update(self.apply_gradients(gradients, model.trainable_parameters(), learning_rate))

    def apply_gradients(
        self,
        gradients: Any,
        parameters: Any,
        learning_rate: float | mx.array | None = None,
        factor: float | mx.array = 1.0,
    ) -> Any:
        """The tree of new parameters after a step. `factor` multiplies every gradient on the way in."""
        current, grads = dict(_flat(parameters)), _flat(gradients)
        self.init(tree_unflatten([(name, current[name]) for name, _ in grads if f"{name}.m" not in self._state]))
        lr = self.learning_rate if learning_rate is None else learning_rate
        self._state[STEP] = self.step + 1
        with_decay, without = (
            numbers(self.step, lr, *self.betas, self.eps, decay, factor) for decay in (self.weight_decay, 0.0)
        )
        keys = self._keys([name for name, _ in grads])
        new = []
        for (name, g), key in zip(grads, keys, strict=True):
            step = Step(with_decay if self.decays(name) else without, key)
            w, moments = adamw(current[name], g, self._moments(name), step)
            self._keep(name, moments)
            new.append((name, w))
        return tree_unflatten(new)

    def _keys(self, names: list[str]) -> list[mx.array]:
        """One uint32 [1] for each name, from seed, name and step."""
        starts = mx.array([(self.seed ^ zlib.crc32(name.encode())) & 0xFFFFFFFF for name in names], dtype=mx.uint32)
        return list(mx.split(hash_u32(hash_u32(starts) + self.step), len(names)))

    def _moments(self, name: str) -> Moments:
        return Moments(self._state[f"{name}.m"], self._state[f"{name}.s"], self._state.get(f"{name}.peak"))

    def _keep(self, name: str, moments: Moments) -> None:
        self._state[f"{name}.m"], self._state[f"{name}.s"] = moments.m, moments.s
        if moments.peak is not None:
            self._state[f"{name}.peak"] = moments.peak


def cosine_with_warmup(step: int, lr: float, warmup: int, steps: int, min_ratio: float) -> float:
    """The learning rate of step `step` (from 0) of `steps`: rises evenly to lr at the last of `warmup` steps, then half
    a cosine down to lr * min_ratio at the last step (Loshchilov & Hutter 2017, arXiv 1608.03983).
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return lr * (min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * share)))


def clip_by_global_norm(gradients: Any, max_norm: float) -> tuple[Any, mx.array]:
    """Gradients scaled so that their joint norm is at most max_norm, and the norm before, float32 (infinite or NaN if a
    gradient is).
    """
    squares = [g.astype(mx.float32).square().sum() for _, g in _flat(gradients)]
    norm = mx.sqrt(mx.stack(squares).sum())
    factor = max_norm / mx.maximum(norm, max_norm)
    return tree_map(lambda g: (g * factor).astype(g.dtype), gradients), norm
