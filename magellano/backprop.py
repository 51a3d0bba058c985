"""The loss of a batch and the gradients of what trains, in one of two forms.

Layer by layer: gradient checkpointing (Chen et al. 2016, arXiv 1604.06174) written out. Forward keeps each layer's
input and nothing else; backward makes a layer's intermediates again, takes its gradients, and forgets them. So a
layer's arrays never outlive it, whatever MLX's graph of a whole model would hold, and work is handed to the device a
layer at a time while the host prepares the next.

On a GPU each layer's two functions are compiled. What cannot be known then is how many token copies each expert gets: a
layer is compiled with room for what has been seen and a fifth more, and a batch that turns out to need more is done
again. So nothing is dropped, and nothing waits for a routing.

Whole: one gradient through all layers, whose intermediates are kept meanwhile: a third faster where there is memory for
them (see activations.py). Not compiled: for CPUs.

Shapes: B batch, T time, D d_model.
"""

import collections
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from magellano.backend import mx, nn, on_gpu, tree_flatten
from magellano.dpo import Pairs
from magellano.layout import parameters
from magellano.model import Layer, MagellanoLM
from magellano.names import LayerKind
from magellano.ops.cross_entropy import Renyi
from magellano.ops.launch import Dialect, dialect
from magellano.ops.many import add_squares, narrow, no_squares
from magellano.ops.moe import Room

_AHEAD = 3  # layers that a GPU has under way at most: what they make cannot be freed before they are done
EMBEDDINGS, FINAL_NORM = "backbone.embeddings", "backbone.norm_f"


@dataclass(frozen=True)
class Batch:
    """Rows as a model takes them, [B, T]: tokens and targets int32, weights float32, reset uint8."""

    tokens: mx.array
    targets: mx.array
    weights: mx.array
    reset: mx.array
    pairs: Pairs | None = None  # pairs of answers, whose preference is the objective


@dataclass(frozen=True)
class Outcome:
    """nll: sum of weight * -log p(target), nats, whatever the objective, or of pairs what `Pairs.measure` sums, float32
    [5]; routers: sums of the routers' losses, float32 [2]; gradients by name; squares: theirs, float32 [256], whose sum
    is the square of their joint norm. All may still be under way.
    """

    nll: mx.array
    routers: mx.array
    gradients: dict[str, mx.array]
    squares: mx.array


class Trainables:
    """The trainable arrays of a part of the model: read them, and call the part with others in their place."""

    def __init__(self, part: nn.Module, prefix: str, sixteen: set[str]):
        paths = list(dict(tree_flatten(part.trainable_parameters())))
        self.names = [f"{prefix}.{path}" for path in paths]
        self._slots = [_slot(part, path) for path in paths]
        self._narrow = [name.rsplit(".", 1)[1] in ("lora_a", "lora_b") or name in sixteen for name in self.names]
        self._ordered = [name.endswith(".lora_m") for name in self.names]  # rows' lengths stay in float32

    def values(self) -> list[mx.array]:
        return [module[key] for module, key in self._slots]

    def narrow(self, values: Sequence[mx.array], dtype: mx.Dtype, order: Sequence[int] | None = None) -> list[mx.array]:
        """`values` with matrices in `dtype`: their products are in it, so their gradients come in it, half as large.
        Those of experts in the order `order`.
        """
        made = list(values)
        for stacked in (False, True):
            which = [k for k, n in enumerate(self._narrow) if n and (values[k].ndim == 3) == stacked]
            if which:
                found = narrow([values[k] for k in which], dtype, order if stacked else None)
                for k, value in zip(which, found, strict=True):
                    made[k] = value
        if which := [k for k, n in enumerate(self._ordered) if n and values[k].ndim == 3 and order is not None]:
            for k, value in zip(which, narrow([values[k] for k in which], mx.float32, order), strict=True):
                made[k] = value
        return made

    def call(self, part: Callable[..., Any], values: Sequence[mx.array], *args: Any, **more: Any) -> Any:
        before = self.values()
        self._put(values)
        try:
            return part(*args, **more)
        finally:
            self._put(before)

    def _put(self, values: Sequence[mx.array]) -> None:
        for (module, key), value in zip(self._slots, values, strict=True):
            module[key] = value


def _slot(part: Any, path: str) -> tuple[Any, str]:
    *way, key = path.split(".")
    for step in way:
        part = part[int(step)] if isinstance(part, list) else part[step]
    return part, key


class Backprop:
    """Loss and gradients of `model`. `loads` maps a MoE layer's number to the most token copies that each expert got in
    a batch so far. `keeps`: activations are kept, not made again. Reads which parameters train when it is made.
    """

    def __init__(self, model: MagellanoLM, renyi: Renyi | None = None, *, keeps: bool = False):
        # What is only promised would be made again in each compiled call, and fused with it
        mx.eval(model.parameters())
        self.model, self.renyi, self.keeps = model, renyi, keeps
        self.loads: dict[int, list[int]] = {}
        self._rooms: dict[int, Room] = {}
        self._tokens = 0  # of the batches that the rooms are for
        sixteen = {spec.name for spec in parameters(model.config) if spec.target is not None}
        layers = model.backbone.layers
        self._layers = [Trainables(x, f"backbone.layers.{i}", sixteen) for i, x in enumerate(layers)]
        self._embeddings = Trainables(model.backbone.embeddings, EMBEDDINGS, sixteen)
        self._norm = Trainables(model.backbone.norm_f, FINAL_NORM, sixteen)
        self.ahead = _AHEAD
        self._running: collections.deque[mx.array] = collections.deque()
        self._compiles = on_gpu() and dialect() is not Dialect.REFERENCE and not keeps
        self._compiled: dict[Any, Callable[..., Any]] = {}

    @property
    def seen(self) -> list[Any]:
        """The batches that the rooms are for, as JSON holds it: their tokens, and `loads`. Other rooms are products of
        other sizes, whose sums a GPU rounds otherwise: a training that goes on needs those that it had. Where layers
        are not compiled there are none, and none are taken on: nothing would watch there that they hold.
        """
        return [self._tokens, [[i, loads] for i, loads in sorted(self.loads.items())]]

    @seen.setter
    def seen(self, told: list[Any]) -> None:
        if not self._compiles:
            return
        self._tokens, self.loads = told[0], {i: list(loads) for i, loads in told[1]}
        self._rooms = {i: Room.padded(loads, self._tokens, spare=True) for i, loads in self.loads.items()}

    def __call__(self, batch: Batch, factor: float, router_factors: tuple[float, float] | None = None) -> Outcome:
        """The gradient of factor * objective plus the routers' losses, load balance and z, times their factors."""
        scale = mx.array([factor] * 4)
        down = None if router_factors is None else mx.array([*router_factors, 0.0, 0.0])
        self._make_rooms(batch)
        while True:
            outcome, sizes = self._pass(batch, scale, down)
            if not self._rooms or self._hold({i: np.array(size_E).tolist() for i, size_E in sizes.items()}):
                return outcome
            del outcome  # its gradients would lie beside those of the next pass

    def _pass(self, batch: Batch, scale: mx.array, down: mx.array | None) -> tuple[Outcome, dict[int, mx.array]]:
        h_BTD = self._run(self._embed, None, batch.tokens, *self._embeddings.values())
        if self.keeps:
            outcome, dh_BTD = self._whole(h_BTD, batch, scale, down)
            sizes: dict[int, mx.array] = {}
        else:
            outcome, dh_BTD, sizes = self._layer_by_layer(h_BTD, batch, scale, down)
        # the embedding, which is the head's too
        gradients, squares = outcome.gradients, outcome.squares
        if names := self._embeddings.names:
            embeddings, at = self.model.backbone.embeddings, len(EMBEDDINGS) + 1
            head = {name[at:]: gradients[name] for name in names}
            found = embeddings.backward(batch.tokens, dh_BTD, head)
            gradients |= {name: found[name[at:]] for name in names}
        squares = add_squares(squares, [gradients[name] for name in [*self._norm.names, *self._embeddings.names]])
        return replace(outcome, squares=squares), sizes

    def _layer_by_layer(
        self, h_BTD: mx.array, batch: Batch, scale: mx.array, down: mx.array | None
    ) -> tuple[Outcome, mx.array, dict[int, mx.array]]:
        """From the embedding's rows the outcome, the gradient of these rows still to be added to it, and each router's
        token copies per expert; `squares` are the layers' alone.
        """
        # 1. forward: each layer's input stays
        inputs, losses, sizes = [], [], {}
        for i, layer in enumerate(self._layers):
            inputs.append(h_BTD)
            h_BTD, *found = self._run(self._forward, i, h_BTD, batch.reset, *layer.values())
            if found:
                losses.append(found[0])
                sizes[i] = found[1]
        # 2. the loss, and what it hands down
        values = [*self._norm.values(), *self._embeddings.values()]
        loss = functools.update_wrapper(functools.partial(self._loss, batch.pairs), self._loss)  # its name is told
        nll, dh_BTD, *found = self._run(loss, None, h_BTD, batch.targets, batch.weights, scale, *values)
        gradients = dict(zip([*self._norm.names, *self._embeddings.names], found, strict=True))
        # 3. backward: the layers in reverse order
        squares = no_squares()
        for i, layer in reversed(list(enumerate(self._layers))):
            given = [inputs.pop(), batch.reset, dh_BTD, squares, *([] if down is None else [down])]
            backward = self._backward if down is None else self._backward_with_routers
            dh_BTD, squares, *found = self._run(backward, i, *given, *layer.values())
            gradients.update(zip(layer.names, found, strict=True))
        return Outcome(nll, _sum(losses), gradients, squares), dh_BTD, sizes

    def _whole(self, h_BTD: mx.array, batch: Batch, scale: mx.array, down: mx.array | None) -> tuple[Outcome, mx.array]:
        """As `_layer_by_layer`, in one gradient."""
        parts = [*self._layers, self._norm, self._embeddings]

        def forward(h_BTD: mx.array, *values: mx.array) -> tuple[mx.array, mx.array, mx.array]:
            left, losses = iter(values), []
            for i, layer in enumerate(self._layers):
                given = islice(left, len(layer.names))
                h_BTD, *routed = self._layer(i, h_BTD, batch.reset, *given, unread=False)
                losses += routed[:1]
            objective, nll = self._objective(batch.pairs, h_BTD, batch.targets, batch.weights, *left)
            return objective, _sum(losses) if down is not None else mx.stop_gradient(_sum(losses)), nll

        def gradient(h_BTD: mx.array, *values: mx.array) -> list[mx.array]:
            cotangents = [_first(scale), mx.zeros((2,)) if down is None else down[:2]]  # nll has no gradient, so none
            (_, routers, nll), found = mx.vjp(forward, [h_BTD, *values], cotangents)
            return [nll, routers, *found]

        values = [v for part in parts for v in part.narrow(part.values(), self.model.compute)]
        nll, routers, dh_BTD, *found = self._run(gradient, None, h_BTD, *values)
        gradients = dict(zip([name for part in parts for name in part.names], found, strict=True))
        squares = add_squares(no_squares(), [gradients[name] for layer in self._layers for name in layer.names])
        return Outcome(nll, routers, gradients, squares), dh_BTD

    def _run(self, function: Callable[..., Any], i: int | None, *arrays: mx.array) -> Any:
        """function of layer i (or of no layer) on `arrays`, its results under way; layers are compiled on a GPU."""
        call = function if i is None else functools.partial(function, i)
        if self._compiles and i is not None:
            key = (function.__name__, i, self._rooms.get(i))
            if key not in self._compiled:
                self._compiled[key] = mx.compile(call)
            call = self._compiled[key]
        made = call(*arrays)
        if not on_gpu():
            mx.eval(made)
            return made
        mx.async_eval(made)
        self._running.append(made[0] if isinstance(made, list) else made)
        while len(self._running) > self.ahead:
            mx.eval(self._running.popleft())
        return made

    def _embed(self, tokens_BT: mx.array, *values: mx.array) -> mx.array:
        h_BTD: mx.array = self._embeddings.call(self.model.backbone.embeddings, values, tokens_BT)
        return h_BTD.astype(self.model.compute)

    def _layer(self, i: int, h_BTD: mx.array, reset_BT: mx.array, *values: mx.array, unread: bool) -> list[mx.array]:
        """The layer's output and, of a MoE layer, its router's losses [2] and token copies per expert [E]."""
        layer: Layer = self.model.backbone.layers[i]
        h_BTD, routed = self._layers[i].call(layer, values, h_BTD, reset_BT, room=self._rooms.get(i), unread=unread)
        return [h_BTD] if routed is None else [h_BTD, *routed]

    def _forward(self, i: int, h_BTD: mx.array, reset_BT: mx.array, *values: mx.array) -> list[mx.array]:
        return self._layer(i, h_BTD, reset_BT, *self._narrow(i, values), unread=False)

    def _narrow(self, i: int, values: Sequence[mx.array]) -> list[mx.array]:
        """In the compute dtype, and experts as the layer's room has them."""
        room = self._rooms.get(i)
        return self._layers[i].narrow(values, self.model.compute, room.order if room else None)

    def _backward(
        self, i: int, h_BTD: mx.array, reset_BT: mx.array, dh_BTD: mx.array, squares: mx.array, *values: mx.array
    ) -> list[mx.array]:
        """The gradient of the layer's input, `squares` with those of the layer's gradients, and these."""
        return self._vjp(i, h_BTD, reset_BT, [dh_BTD], squares, values)

    def _backward_with_routers(
        self,
        i: int,
        h_BTD: mx.array,
        reset_BT: mx.array,
        dh_BTD: mx.array,
        squares: mx.array,
        down: mx.array,
        *values: mx.array,
    ) -> list[mx.array]:
        moe = self.model.config.kind(i) is LayerKind.MOE
        return self._vjp(i, h_BTD, reset_BT, [dh_BTD, down[:2]] if moe else [dh_BTD], squares, values)

    def _vjp(
        self,
        i: int,
        h_BTD: mx.array,
        reset_BT: mx.array,
        cotangents: list[mx.array],
        squares: mx.array,
        values: Sequence[mx.array],
    ) -> list[mx.array]:
        def call(h_BTD: mx.array, *values: mx.array) -> list[mx.array]:
            return self._layer(i, h_BTD, reset_BT, *values, unread=True)[: len(cotangents)]

        dh_BTD, *found = mx.vjp(call, [h_BTD, *self._narrow(i, values)], cotangents)[1]
        if room := self._rooms.get(i):
            back = sorted(range(room.experts), key=room.order.__getitem__)
            found = self._layers[i].narrow(found, self.model.compute, back)
        return [dh_BTD, add_squares(squares, found), *found]

    def _loss(
        self,
        pairs: Pairs | None,
        h_BTD: mx.array,
        targets_BT: mx.array,
        weights_BT: mx.array,
        scale: mx.array,
        *values: mx.array,
    ) -> list[mx.array]:
        """nll, and the gradients of the objective times scale's first element in h, the final norm and the head."""
        split = len(self._norm.names)

        def objective(h_BTD: mx.array, *values: mx.array) -> tuple[mx.array, mx.array]:
            return self._objective(pairs, h_BTD, targets_BT, weights_BT, *values)

        narrow = [*values[:split], *self._embeddings.narrow(values[split:], self.model.compute)]
        down = _first(scale)
        (_, nll), gradients = mx.vjp(objective, [h_BTD, *narrow], [down, mx.zeros_like(down)])
        return [nll, *gradients]

    def _objective(
        self, pairs: Pairs | None, h_BTD: mx.array, targets_BT: mx.array, weights_BT: mx.array, *values: mx.array
    ) -> tuple[mx.array, mx.array]:
        """The objective and nll from the last layer's output and the arrays of the final norm and the head."""
        model, split = self.model, len(self._norm.names)
        h_BTD = self._norm.call(model.backbone.norm_f, values[:split], h_BTD)
        if pairs is not None:
            found: tuple[mx.array, mx.array] = self._embeddings.call(
                pairs.objective, values[split:], model, h_BTD, targets_BT
            )
            return found
        both: tuple[mx.array, mx.array] = self._embeddings.call(
            model.objective, values[split:], h_BTD, targets_BT, weights_BT, self.renyi, _counted(weights_BT)
        )
        return both

    def _make_rooms(self, batch: Batch) -> None:
        """Rooms for batches of this size, from the loads of a pass that waits for each layer's routing."""
        if not self._compiles or batch.tokens.size == self._tokens:
            return
        self.loads, self._rooms, self._tokens = {}, {}, batch.tokens.size
        h_BTD, sizes = self._embed(batch.tokens, *self._embeddings.values()), {}
        for i, layer in enumerate(self._layers):
            h_BTD, *found = self._layer(i, h_BTD, batch.reset, *layer.values(), unread=False)
            mx.eval(h_BTD, found)
            if found:
                sizes[i] = np.array(found[1]).tolist()
        self._hold(sizes)

    def _hold(self, sizes: dict[int, list[int]]) -> bool:
        """Whether every layer's room held these loads; larger rooms where not."""
        held = True
        for i, loads in sizes.items():
            if i in self._rooms and self._rooms[i].holds(loads):
                continue
            self.loads[i] = [max(pair) for pair in zip(loads, self.loads.get(i, loads), strict=True)]
            self._rooms[i] = Room.padded(self.loads[i], self._tokens, spare=True)
            held = False
        return held


def _first(scale: mx.array) -> mx.array:
    return mx.split(scale, scale.size)[0].reshape(())


def _sum(losses: list[mx.array]) -> mx.array:
    """The routers' losses, [2]."""
    return mx.stack(losses).sum(axis=0) if losses else mx.zeros((2,))


def _counted(weights_BT: mx.array) -> mx.array | None:
    """The rows 0 .. B*T-1 that count, if the head is to see them alone. The head is a good part of a CPU's step, and a
    completion's prompt has no loss; a GPU wants steps of one shape.
    """
    if on_gpu():
        return None
    rows = np.flatnonzero(np.array(weights_BT))
    return mx.array(rows) if 0 < rows.size < weights_BT.size else None
