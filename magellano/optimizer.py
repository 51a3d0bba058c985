"""AdamW over a tree of parameters, used as mlx.optimizers are; learning-rate schedule; clipping by the global norm."""

import itertools
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from magellano.backend import mx, nn, on_gpu, tree_flatten, tree_map, tree_unflatten
from magellano.names import StateDtype
from magellano.ops import adamw as op
from magellano.ops.adamw import Moments, Numbers, adamw
from magellano.ops.many import add_squares, join, no_squares

STEP = "step"
PARTS = ("m", "s", "peak")
SMALL_ON_GPU, SMALL_ON_CPU = 1 << 20, 1 << 18  # elements; smaller tensors step together
JOINED = 1 << 23  # elements that step together at most: their new values exist beside the old
_AHEAD = 4  # groups of tensors that a GPU has under way at most
_WINDOW = 64  # steps whose numbers are made and uploaded at once


def _flat(tree: Any) -> list[tuple[str, mx.array]]:
    return list(tree_flatten(tree))  # type: ignore[arg-type]


@dataclass
class _Group:
    """Tensors that take their step together, as one flat tensor: one large one, or many small ones of one kind."""

    names: list[str]
    shapes: list[tuple[int, ...]]
    own: mx.array  # float32 [8], see op.own_numbers
    times: float  # its learning rate over the optimiser's
    moments: Moments  # flat
    given: list[mx.array]  # the last new parameters that were handed out, and the flat tensor that they are views of
    flat: mx.array | None = None

    def weights(self, current: Mapping[str, mx.array]) -> mx.array:
        """The parameters as one flat tensor; joined anew only if one isn't the very object that was handed out last
        (nn.value_and_grad puts new ones into a model).
        """
        now = [current[name] for name in self.names]
        if self.flat is not None and all(a is b for a, b in zip(now, self.given, strict=True)):
            return self.flat
        return join(now)

    def states(self) -> Iterator[tuple[str, mx.array]]:
        """(NAME.PART, a view of the flat state)."""
        for part in PARTS:
            whole = getattr(self.moments, part)
            if whole is not None:
                yield from zip([f"{name}.{part}" for name in self.names], _cut(whole, self.shapes), strict=True)


class AdamW:
    """AdamW with decoupled weight decay, optional AMSGrad, float32 or float16 states (see magellano/ops/adamw.py).

    `learning_rate` is a number or a function of the step, from 0, which is asked for up to 64 steps ahead: on a GPU a
    step must upload nothing, for that costs more than the step. It may be set anew at any time.

    `decays(name)` says which parameters weight decay touches; by default all. `rates(name)` multiplies a parameter's
    learning rate, and so what decays of it; by default 1. Small parameters of one kind step as few
    flat tensors: a launch costs more than they do. The stochastic rounding of float16 states depends on the seed, the
    step, and which parameters step together.

    `state` is one flat dict: "step", and for each parameter NAME.m, NAME.s and, with AMSGrad, NAME.peak; it can be set
    from any tree that flattens to these names. Until it is read the optimiser is its states' only owner, and on a CPU
    it writes over them; so read it to save it, and after a step call `evaluate`. Not for mx.compile: steps are counted
    here.
    """

    def __init__(
        self,
        learning_rate: float | Callable[[int], float] = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        state: StateDtype = StateDtype.FLOAT32,
        seed: int = 0,
        *,
        amsgrad: bool = False,
        decays: Callable[[str], bool] = lambda name: True,
        rates: Callable[[str], float] = lambda name: 1.0,
    ):
        self.learning_rate, self.betas, self.eps, self.weight_decay = learning_rate, betas, eps, weight_decay
        self.dtype = {StateDtype.FLOAT32: mx.float32, StateDtype.FLOAT16: mx.float16}[StateDtype(state)]
        self.seed, self.amsgrad, self.decays, self.rates = seed, amsgrad, decays, rates
        self._step = 0
        self._loose: dict[str, mx.array] = {}  # states of parameters that are in no group yet
        self._groups: list[_Group] = []
        self._kinds: list[Any] = []  # what the groups were made for
        self._settings: Any = None  # with what
        self._alone = True  # nobody else holds the groups' states
        self._windows: dict[float, tuple[Any, range, list[mx.array]]] = {}  # what it was made from, its steps, theirs

    @property
    def state(self) -> dict[str, mx.array]:
        self._alone = False
        return {STEP: self.step, **self._loose, **{n: a for group in self._groups for n, a in group.states()}}

    @state.setter
    def state(self, tree: Any) -> None:
        self._loose, self._groups, self._kinds = dict(_flat(tree)), [], []
        self._step = int(np.array(self._loose.pop(STEP)))

    @property
    def step(self) -> mx.array:
        """Steps taken, uint32."""
        return mx.array(self._step, dtype=mx.uint32)

    def evaluate(self, *others: Any) -> None:
        """mx.eval of the states, which stay in the optimiser's hands, and of the trees `others`."""
        moments = [getattr(group.moments, part) for group in self._groups for part in self._parts]
        mx.eval(*others, self._loose, moments)

    def init(self, parameters: Any) -> None:
        """Zero states for every array of the tree `parameters`."""
        states = self.state
        del states[STEP]
        zeros = {
            f"{name}.{part}": mx.zeros(a.shape, self.dtype) for name, a in _flat(parameters) for part in self._parts
        }
        self._loose, self._groups, self._kinds = {**states, **zeros}, [], []

    def update(
        self,
        model: nn.Module,
        gradients: Any,
        learning_rate: float | mx.array | None = None,
        factor: float | mx.array = 1.0,
    ) -> None:
        """Take a step: `model`'s parameters that have gradients are replaced. See `apply_gradients`."""
        model.update(self.apply_gradients(gradients, model.trainable_parameters(), learning_rate, factor))

    def apply_gradients(
        self,
        gradients: Any,
        parameters: Any,
        learning_rate: float | mx.array | None = None,
        factor: float | mx.array = 1.0,
    ) -> Any:
        """The tree of new parameters after a step.

        `learning_rate`: instead of the optimiser's own, at the cost of an upload in this step. `factor` multiplies
        every gradient on the way in; an array, such as `gradient_factor` makes, is never waited for. Where it is not
        finite, parameters and states stay as they are; whoever learns of that later says `take_back`.
        """
        new = self._stepped(dict(_flat(parameters)), dict(_flat(gradients)), learning_rate, factor)
        leaves = iter([new[name] for name, _ in _flat(gradients)])
        return tree_map(lambda _: next(leaves), gradients)

    def consume(
        self,
        model: nn.Module,
        gradients: dict[str, mx.array],
        learning_rate: float | mx.array | None = None,
        factor: float | mx.array = 1.0,
    ) -> None:
        """`update` by gradients by name, in a dict that is emptied: each goes once its step is taken, and so does the
        parameter's old value, so that the new ones take their place in memory.
        """
        current = dict(_flat(model.trainable_parameters()))
        self._stepped(current, gradients, learning_rate, factor, model)

    def _stepped(
        self,
        current: dict[str, mx.array],
        grads: dict[str, mx.array],
        learning_rate: float | mx.array | None,
        factor: float | mx.array,
        model: nn.Module | None = None,
    ) -> dict[str, mx.array]:
        """The new parameters by name; empties `grads`. With `model` they go there, one after the other, `current` is
        emptied too, and a GPU has only a few under way.
        """
        self._arrange(current, grads)
        self._step += 1
        now = {times: self._now(learning_rate, times) for times in {group.times for group in self._groups}}
        factors = op.factor_numbers(factor)
        new: dict[str, mx.array] = {}
        running: list[mx.array] = []
        for group in self._groups:
            w, g = group.weights(current), join([grads.pop(name) for name in group.names])
            numbers = Numbers(now[group.times], group.own, factors)
            w, group.moments = adamw(w, g, group.moments, numbers, in_place=self._alone)
            group.flat, group.given = w, _cut(w, group.shapes)
            made = dict(zip(group.names, group.given, strict=True))
            if model is None:
                new.update(made)
            else:
                model.update(tree_unflatten(list(made.items())))
                for name in group.names:
                    del current[name]
            del w, g, made
            if model is not None and on_gpu():
                mx.async_eval(group.flat, group.moments.m, group.moments.s)
                running.append(group.flat)
                if len(running) > _AHEAD:
                    mx.eval(running.pop(0))
        self._alone = True
        return new

    def take_back(self) -> None:
        """Do not count the last step, whose factor was not finite."""
        self._step -= 1

    def _now(self, learning_rate: float | mx.array | None, times: float) -> mx.array:
        """The numbers of step `self._step` at `times` the learning rate, made for many steps at once (see
        op.now_numbers).
        """
        if learning_rate is not None:
            return op.now_of(self._step, learning_rate if times == 1.0 else learning_rate * times, self.betas)
        made_from, window = (self.learning_rate, self.betas), self._windows.get(times)
        if window is None or window[0] != made_from or self._step not in window[1]:
            steps = range(self._step, self._step + _WINDOW)
            lr = self.learning_rate
            rates = [times * (lr(t - 1) if callable(lr) else lr) for t in steps]
            window = self._windows[times] = made_from, steps, op.now_numbers(self._step, rates, self.betas)
        return window[2][self._step - window[1].start]

    @property
    def _parts(self) -> tuple[str, ...]:
        return PARTS if self.amsgrad else PARTS[:2]

    def _arrange(self, current: Mapping[str, mx.array], grads: Mapping[str, mx.array]) -> None:
        """Make the groups for these parameters, unless they are the last step's."""
        kinds = [(name, (w := current[name]).shape, w.dtype, g.dtype) for name, g in grads.items()]
        settings = (self.betas, self.eps, self.weight_decay)
        if kinds == self._kinds and settings == self._settings:
            return
        self._settings = settings
        self.init(tree_unflatten([(name, current[name]) for name in grads if not self._known(name)]))
        small: dict[Any, list[list[str]]] = {}
        groups, self._alone = [], False  # the states may be someone's arrays
        for name, _, *dtypes in kinds:
            if current[name].size < (SMALL_ON_GPU if on_gpu() else SMALL_ON_CPU):
                joined = small.setdefault((self.decays(name), self.rates(name), *dtypes), [[]])
                if joined[-1] and sum(current[n].size for n in (*joined[-1], name)) > JOINED:
                    joined.append([])
                joined[-1].append(name)
            else:
                groups.append([name])
        names = [*itertools.chain(*small.values()), *groups]
        self._groups, self._kinds = [self._group(group, current) for group in names], kinds

    def _known(self, name: str) -> bool:
        return f"{name}.m" in self._loose or any(name in group.names for group in self._groups)

    def _group(self, names: list[str], current: Mapping[str, mx.array]) -> _Group:
        moments = Moments(*(join([self._loose.pop(f"{name}.{part}") for name in names]) for part in self._parts))
        salt = zlib.crc32("\n".join(names).encode(), self.seed & 0xFFFFFFFF)
        decay = self.weight_decay if self.decays(names[0]) else 0.0
        own = op.own_numbers(self.betas, self.eps, decay, salt)
        return _Group(names, [current[name].shape for name in names], own, self.rates(names[0]), moments, [])


def _cut(flat: mx.array, shapes: list[tuple[int, ...]]) -> list[mx.array]:
    """`join` backwards."""
    if len(shapes) == 1:
        return [flat.reshape(shapes[0])]
    ends = list(itertools.accumulate(math.prod(shape) for shape in shapes))[:-1]
    return [a.reshape(shape) for a, shape in zip(mx.split(flat, ends), shapes, strict=True)]


def cosine_with_warmup(step: int, lr: float, warmup: int, steps: int, min_ratio: float) -> float:
    """The learning rate of step `step` (from 0) of `steps`: rises evenly to lr at the last of `warmup` steps, then half
    a cosine down to lr * min_ratio at the last step (Loshchilov & Hutter 2017, arXiv 1608.03983).
    """
    if step < warmup:
        return lr * (step + 1) / warmup
    share = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return lr * (min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + math.cos(math.pi * share)))


def global_norm(gradients: Any) -> mx.array:
    """The joint norm of all gradients, float32; infinite or NaN if a gradient is."""
    squares = add_squares(no_squares(), [g for _, g in _flat(gradients)])
    return mx.sqrt(squares.sum())


def gradient_factor(norm: mx.array, max_norm: float, scale: float = 1.0) -> mx.array:
    """AdamW's `factor` for gradients of `scale` times their true size and joint norm `norm`, so scaled too: undoes the
    scale and clips the true norm to max_norm. Float32 [8], computed on the device: nobody waits for the norm.
    NaN where the norm is not finite.
    """
    top, limit = op.factor_numbers(max_norm), op.factor_numbers(max_norm * scale)
    return (top + (norm - norm)) / mx.maximum(norm, limit)


def clip_by_global_norm(gradients: Any, max_norm: float) -> tuple[Any, mx.array]:
    """Gradients scaled so that their joint norm is at most max_norm, and the norm before. AdamW can take what
    `gradient_factor` makes instead, which saves a pass over the gradients.
    """
    norm = global_norm(gradients)
    factor = max_norm / mx.maximum(norm, max_norm)
    return tree_map(lambda g: (g * factor).astype(g.dtype), gradients), norm
