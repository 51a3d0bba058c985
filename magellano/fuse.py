"""An adapter merged into its base: in 16 bits, or in NF4 again with the rounding error carried on (requantize.py); and
what that costs, measured on the held-out split.

Shapes: M tokens, D d_model, E experts, V vocabulary, B batch, T time.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import numpy as np

from magellano import merge, requantize
from magellano.backend import mx, nn
from magellano.data.shards import Batch
from magellano.layout import parameters
from magellano.linear import Adapted
from magellano.loader import quantized_tensors
from magellano.mamba import Mamba
from magellano.model import Layer, MagellanoLM
from magellano.moe import MoE
from magellano.nf4 import NF4Stack, NF4Tensor
from magellano.ops import gated
from magellano.ops.moe import route

CHUNK = 256  # rows whose logits exist at once
Errors = dict[str, tuple[float, float]]  # by matrix: the share of its products that is lost, carried on and to nearest


class Listening(nn.Module):
    """A projection that remembers its inputs' second moment; it computes what it did before."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner
        self.moment: np.ndarray | None = None

    def __call__(self, x: mx.array, *, unread: bool = False) -> mx.array:
        found = requantize.moment(x.reshape(-1, x.shape[-1]))
        self.moment = found if self.moment is None else self.moment + found
        return self.inner(x)

    @property
    def bias(self) -> mx.array:
        return self.inner.bias


def requantized(model: MagellanoLM, batches: list[Batch], errors: Errors) -> Iterator[tuple[str, mx.array]]:
    """The parameters of `model`, adapters merged, its NF4 matrices in NF4 again, for the inputs that they meet in
    `batches`; a layer at a time, so that one layer's moments are held. `errors` is filled on the way.
    """
    left = dict(merge.tensors_by_name(model))
    states = [model.backbone.embeddings(mx.array(b.tokens)).astype(model.compute) for b in batches]
    resets = [mx.array(b.reset) for b in batches]
    for index, layer in enumerate(model.backbone.layers):
        at = f"backbone.layers.{index}.mixer."
        moments = _mamba(layer, states, resets) if isinstance(layer.mixer, Mamba) else _moe(layer, states)
        for path, of in moments.items():
            module = merge.at(layer.mixer, path)
            yield from _stored(f"{at}{path}.weight", module, of, errors)
            left.pop(f"{at}{path}.weight")
        for n, (h, reset) in enumerate(zip(states, resets, strict=True)):
            states[n], _ = layer(h, reset)
            mx.eval(states[n])
        mx.clear_cache()
    last = requantize.moment(mx.concatenate([model.backbone.norm_f(h).reshape(-1, h.shape[-1]) for h in states]))
    for spec in parameters(model.config):
        if spec.name in left and spec.target is not None:
            yield from _stored(spec.name, left.pop(spec.name), lambda _: last, errors)
    for name, value in left.items():
        assert isinstance(value, mx.array)
        yield name, value


Moment = Callable[[int], np.ndarray]  # of a matrix's inputs, by expert; 0 where there are none


def _stored(name: str, module: Adapted, of: Moment, errors: Errors) -> Iterator[tuple[str, mx.array]]:
    """The stored tensors of a matrix or an expert stack: NF4 where it was, else dense."""
    if isinstance(module.base, mx.array):
        yield name, merge.weight(module)
        return
    pieces: list[NF4Tensor] = []
    base = module.base
    for e, w in enumerate(merge.pieces(module)):
        grid = base[e] if isinstance(base, NF4Stack) else base
        tensor, carried, nearest = requantize.requantized(w, of(e), grid)
        errors[f"{name}/{e}"] = carried, nearest
        pieces.append(tensor)
    yield from quantized_tensors(name, pieces, stacked=len(merge.shape(module)) == 3)


def _mamba(layer: Layer, states: list[mx.array], resets: list[mx.array]) -> dict[str, Moment]:
    """What listens to each projection of the mixer while it runs once."""
    mixer, names = layer.mixer, ("in_proj", "x_proj", "dt_proj", "out_proj")
    inner = {name: mixer[name] for name in names}
    for name in names:
        mixer[name] = Listening(inner[name])
    try:
        for h, reset in zip(states, resets, strict=True):
            mx.eval(layer(h, reset)[0])
        found = {name: mixer[name].moment for name in names}
    finally:
        for name in names:
            mixer[name] = inner[name]
    return {name: functools.partial(_same, found[name]) for name in names}


def _same(moment_II: np.ndarray, _: int) -> np.ndarray:
    return moment_II


def _moe(layer: Layer, states: list[mx.array]) -> dict[str, Moment]:
    """The moments of each expert's inputs, made when asked for: w1 sees its tokens, w2 what becomes of them."""
    mixer = layer.mixer
    assert isinstance(mixer, MoE)
    u_MD = mx.concatenate([layer.norm(h).reshape(-1, h.shape[-1]) for h in states])
    expert_Mk = np.array(route(mixer.router(u_MD), mixer.config.top_k).expert_Mk)

    def seen(e: int) -> mx.array:
        rows = np.flatnonzero((expert_Mk == e).any(axis=1))
        return u_MD[mx.array(rows)] if len(rows) else mx.zeros((1, u_MD.shape[1]))

    def hidden(e: int) -> mx.array:
        h = seen(e).astype(mx.float32) @ merge.piece(mixer.experts.w1, e).T
        return gated.forward(h, mixer.config.hidden)

    return {
        "experts.w1": lambda e: requantize.moment(seen(e)),
        "experts.w2": lambda e: requantize.moment(hidden(e)),
    }


@dataclass(frozen=True)
class Cost:
    """On the held-out split, in nats a target token: losses, and Kullback-Leibler divergences from base + adapter."""

    tokens: int
    loss_base: float
    loss_adapted: float
    loss_fused: float
    divergence_base: float
    divergence_fused: float

    def too_much(self, bound: float) -> str | None:
        """Why the fused model is too far from base + adapter, or None. `bound`: nats a token."""
        moved = abs(self.loss_fused - self.loss_adapted)
        if moved <= bound and self.divergence_fused <= bound:
            return None
        return (
            f"the fused model is not base + adapter: held-out loss {self.loss_fused:.4f} for {self.loss_adapted:.4f} "
            f"(base {self.loss_base:.4f}), divergence {self.divergence_fused:.4f} nats a token (base "
            f"{self.divergence_base:.4f}), more than the bound {bound:g}"
        )

    def to_dict(self) -> dict[str, float]:
        return asdict(self)


def cost(adapted: MagellanoLM, fused: MagellanoLM, batches: Iterator[Batch]) -> Cost:
    """Both models, and the first without its adapter, on the targets that count in `batches`."""
    sums, tokens = np.zeros(5), 0
    for rows in batches:
        counted = np.flatnonzero(rows.weights.reshape(-1) > 0)
        if not len(counted):
            continue
        given, at = (mx.array(rows.tokens), mx.array(rows.reset)), mx.array(counted)
        hidden = [adapted.hidden(*given), fused.hidden(*given)]
        with without_adapters(adapted):
            hidden.append(adapted.hidden(*given))
            mx.eval(hidden)
        hidden = [h.reshape(-1, h.shape[-1])[at] for h in hidden]
        targets = mx.array(rows.targets.reshape(-1)[counted])
        for start in range(0, len(counted), CHUNK):
            part = slice(start, start + CHUNK)
            sums += _sums(adapted, fused, [h[part] for h in hidden], targets[part])
        tokens += len(counted)
    assert tokens, "the held-out split has no target that counts"
    a, f, b, kl_f, kl_b = (sums / tokens).tolist()
    return Cost(tokens, loss_base=b, loss_adapted=a, loss_fused=f, divergence_base=kl_b, divergence_fused=kl_f)


def _sums(adapted: MagellanoLM, fused: MagellanoLM, hidden: list[mx.array], target_M: mx.array) -> np.ndarray:
    logits = [adapted.logits(hidden[0]), fused.logits(hidden[1])]
    with without_adapters(adapted):
        logits.append(adapted.logits(hidden[2]))
        mx.eval(logits)
    log_p = [x.astype(mx.float32) - mx.logsumexp(x.astype(mx.float32), axis=-1, keepdims=True) for x in logits]
    losses = [-mx.take_along_axis(p, target_M[:, None], axis=-1).sum() for p in log_p]
    p = mx.exp(log_p[0])
    divergences = [(p * (log_p[0] - q)).sum() for q in log_p[1:]]
    return np.array([x.item() for x in [*losses, *divergences]])


class without_adapters:
    """Inside the `with` a model's adapters have no effect."""

    def __init__(self, model: MagellanoLM):
        self._modules = [m for _, m in model.named_modules() if isinstance(m, Adapted) and m.adapted]

    def __enter__(self) -> None:
        for module in self._modules:
            module.silent = True

    def __exit__(self, *_: object) -> None:
        for module in self._modules:
            module.silent = False
