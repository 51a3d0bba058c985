"""The experts' two layers over their own rows (see moe.py for how the rows come there), dense or NF4, with or without
adapters: y = sum over a token's experts of gate * w2'(relu(w1'(u))), w' x = W x + s B (A x).

Products run in one of three forms. Padded rows [E, C, D]: one batched product; on an H200 it runs at 590 TFLOP/s where
eight products run at 110 to 130. Sorted rows [N, D] with known sizes: one product for each expert. Sorted rows inside
mx.compile, where sizes are no values: mx.gather_mm.

Shapes: M tokens, E experts, k experts per token, N rows, C rows of an expert if padded, D in, F hidden, r LoRA rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

from magellano.backend import mx
from magellano.ops.launch import Kernel, gpu_geometry
from magellano.ops.lazy import detached, plain
from magellano.ops.moe import Groups, Places, gather, spread
from magellano.ops.nf4 import Quantized

_HIDDEN_BACKWARD = Kernel("moe_hidden_backward", ("da", "a", "gate", "copy"), ("dh", "dgate"))
_THREADS = 256  # of a threadgroup on a GPU


class Stack(Protocol):
    """What is needed of E NF4 matrices of one shape (see magellano/nf4.py)."""

    def __len__(self) -> int: ...

    def __getitem__(self, e: int, /) -> Quantized: ...

    def dequantize(self, dtype: mx.Dtype = ..., after: mx.array | None = None) -> mx.array: ...


Weights = mx.array | Stack


@dataclass(frozen=True)
class Layer:
    """One layer of all experts: W [E, O, I], dense or NF4, and its adapter A [E, r, I], B [E, O, r] with s, if any. NF4
    weights and those under an adapter are frozen.
    """

    weight: Weights
    a: mx.array | None = None
    b: mx.array | None = None
    scale: float = 0.0

    @property
    def trains(self) -> bool:
        return isinstance(self.weight, mx.array) and self.a is None

    def arrays(self) -> list[mx.array]:
        """What can have a gradient."""
        if self.a is not None and self.b is not None:
            return [self.a, self.b]
        return [cast(mx.array, self.weight)] if self.trains else []

    def with_arrays(self, arrays: Sequence[mx.array]) -> "Layer":
        if self.a is not None:
            return Layer(self.weight, arrays[0], arrays[1], self.scale)
        return Layer(arrays[0]) if self.trains else self

    def __call__(self, x: mx.array, groups: Groups) -> tuple[mx.array, mx.array | None]:
        """w' x for each row, and A x."""
        y = times(x, self.weight, groups)
        if self.a is None or self.b is None:
            return y, None
        low = times(x, self.a, groups)
        return add_times(y, low, self.b, groups, self.scale), low

    def back(self, dy: mx.array, groups: Groups) -> tuple[mx.array, mx.array | None]:
        """The gradient of x, and that of s A x."""
        dx = times(dy, self.weight, groups, transposed=True)
        if self.a is None or self.b is None:
            return dx, None
        dlow = times(dy, self.b, groups, transposed=True)
        return add_times(dx, dlow, self.a, groups, self.scale, transposed=True), dlow

    def gradients(
        self, x: mx.array, low: mx.array | None, dy: mx.array, dlow: mx.array | None, groups: Groups
    ) -> list[mx.array]:
        """Of `arrays`."""
        experts = len(self.weight)
        if low is not None and dlow is not None:
            return [outer(self.scale * dlow, x, groups, experts), outer(dy, self.scale * low, groups, experts)]
        return [outer(dy, x, groups, experts)] if self.trains else []


def feed_forward(
    u_MD: mx.array, gate_Mk: mx.array, at: Places, w1: Layer, w2: Layer, *, unread: bool = False
) -> mx.array:
    """The mixture's output y_MD in u's dtype. Differentiable in u, the gates, adapters, and weights that are dense and
    without an adapter. `unread`: the caller wants gradients only, so y may be left out.

    The gradient of a gate needs no second product: the output is linear in a = relu(h), so it is da . a, where da is
    what the output's gradient becomes at a. Rows come back unweighted, and the gates count once, in the last sum.
    """
    split = len(w1.arrays())

    def layers(arrays: Sequence[mx.array]) -> tuple[Layer, Layer]:
        return w1.with_arrays(arrays[:split]), w2.with_arrays(arrays[split:])

    @mx.custom_function
    def mixture(u_MD: mx.array, gate_Mk: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
        first, second = layers(arrays)
        # 1. the copies go to their experts
        x = spread(u_MD, at)
        # 2. up, and what is positive stays
        h, low1 = first(x, at.groups)
        a = detached(mx.maximum(h, 0))
        kept = (x, a) if low1 is None else (x, a, low1)
        if unread:
            return mx.zeros(u_MD.shape, u_MD.dtype), *kept
        # 3. down, back to the tokens, weighted by the gates
        return gather(second(a, at.groups)[0], at, gate_Mk), *kept

    @mixture.vjp
    def mixture_vjp(primals, cotangents, outputs):  # type: ignore[no-untyped-def]
        gate_Mk, *arrays = primals[1:]
        first, second = layers(arrays)
        x, a, *low1 = outputs[1:]
        dy = spread(cotangents[0], at)
        da, dlow2 = second.back(dy, at.groups)
        dh, dgate_Mk = hidden_backward(da, a, gate_Mk, at)
        dx, dlow1 = first.back(dh, at.groups)
        found = first.gradients(x, low1[0] if low1 else None, dh, dlow1, at.groups)
        if second.a is not None and dlow2 is not None:  # the gates weigh the thin factors
            low2, dlow2 = weigh(times(a, second.a, at.groups), gate_Mk, at), weigh(dlow2, gate_Mk, at)
            found += second.gradients(a, low2, dy, dlow2, at.groups)
        elif second.trains:
            found += second.gradients(a, None, weigh(dy, gate_Mk, at), None, at.groups)
        return gather(dx, at), dgate_Mk, *found

    outputs: tuple[mx.array, ...] = mixture(u_MD, gate_Mk, *w1.arrays(), *w2.arrays())  # type: ignore[assignment]
    return outputs[0]


def weigh(y: mx.array, gate_Mk: mx.array, at: Places) -> mx.array:
    """Each row times the gate of its copy; padding is zero already."""
    gate_N1 = gate_Mk.reshape(-1)[mx.maximum(at.copy_N, 0)][:, None].astype(y.dtype)
    return (y.reshape(-1, y.shape[-1]) * gate_N1).reshape(y.shape)


def hidden_backward(da: mx.array, a: mx.array, gate_Mk: mx.array, at: Places) -> tuple[mx.array, mx.array]:
    """dh = gate * da where a > 0, shaped as a, and the gates' gradient da . a, float32 [M, k]."""
    width, shape = a.shape[-1], a.shape
    da, a = da.reshape(-1, width), a.reshape(-1, width)
    if not a.size or plain(da, a, gate_Mk, at.copy_N):
        gate_N = mx.where(at.copy_N < 0, 0.0, gate_Mk.reshape(-1)[mx.maximum(at.copy_N, 0)])
        dgate_N = (da.astype(mx.float32) * a.astype(mx.float32)).sum(axis=1)
        dh = mx.where(a > 0, gate_N[:, None] * da.astype(mx.float32), 0.0).astype(a.dtype)
        return dh.reshape(shape), dgate_N[at.row_Mk]
    pack = 16 // a.dtype.size
    pack = pack if gpu_geometry() and width % pack == 0 else 1
    dh, dgate_S = _HIDDEN_BACKWARD(
        [da, a, gate_Mk.reshape(-1), at.copy_N],
        template={"T": a.dtype, "SG": _THREADS // 32, "V": pack},
        grid=(a.shape[0] * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        host_template={"SG": 1},
        host_grid=(a.shape[0], 1, 1),
        output_shapes=[a.shape, (gate_Mk.size,)],
        output_dtypes=[a.dtype, mx.float32],
    )
    return dh.reshape(shape), dgate_S.reshape(gate_Mk.shape)


def times(x: mx.array, w: Weights, groups: Groups, transposed: bool = False) -> mx.array:
    """Each row of x times its expert's W^T, or W if `transposed`: x [E, C, I] padded, or [N, I] sorted, where the first
    groups[0] rows belong to expert 0, and so on; sizes may be 0. Inside mx.compile groups is the expert of each row.
    No gradient of its own.
    """
    if x.ndim == 3:
        assert x.shape[0] == len(w), f"{x.shape} for {len(w)} experts"
        if isinstance(w, mx.array):
            return x @ (w if transposed else w.swapaxes(1, 2))
        if gpu_geometry():  # all experts are made dense in one launch and multiplied in another
            w_EOI = w.dequantize(x.dtype, after=x)
            return x @ (w_EOI if transposed else w_EOI.swapaxes(1, 2))
        groups, width = [x.shape[1]] * x.shape[0], x.shape[2]
        return times(x.reshape(-1, width), w, groups, transposed).reshape(*x.shape[:2], -1)
    if isinstance(groups, mx.array):
        return _gathered(x, w, groups, transposed)
    assert sum(groups) == x.shape[0], f"sizes {groups} do not sum to the {x.shape[0]} rows"
    assert len(groups) == len(w), f"{len(groups)} sizes for {len(w)} experts"
    each = [m.reshape(m.shape[1:]) for m in mx.split(w, len(w))] if isinstance(w, mx.array) else []  # w[e] would copy
    parts: list[mx.array] = []
    for e, rows in _groups(groups):
        # An NF4 expert is made dense only when the product before is done.
        w_OI = each[e] if isinstance(w, mx.array) else w[e].dequantize(x.dtype, after=parts[-1] if parts else x)
        parts.append(detached(x[rows] @ (w_OI if transposed else w_OI.T)))
    return mx.concatenate(parts) if parts else mx.zeros((0, _width(w, transposed)), x.dtype)


def add_times(
    y: mx.array, x: mx.array, w: mx.array, groups: Groups, scale: float, transposed: bool = False
) -> mx.array:
    """y + scale * `times`, in one pass where rows are padded."""
    if x.ndim == 3:
        return mx.addmm(y, x, w if transposed else w.swapaxes(1, 2), alpha=scale)
    return y + times(scale * x, w, groups, transposed)


def outer(p: mx.array, q: mx.array, groups: Groups, experts: int) -> mx.array:
    """For each expert p^T q over its rows: [E, P, Q]."""
    if p.ndim == 3:
        return p.swapaxes(1, 2) @ q
    if isinstance(groups, mx.array):
        return mx.stack([mx.where(groups[:, None] == e, p, 0).T @ q for e in range(experts)])
    found = {e: p[rows].T @ q[rows] for e, rows in _groups(groups)}
    nothing = mx.zeros((p.shape[1], q.shape[1]), p.dtype)
    return mx.stack([found.get(e, nothing) for e in range(experts)])


def _width(w: Weights, transposed: bool) -> int:
    shape = w.shape[1:] if isinstance(w, mx.array) else w[0].shape
    return shape[1 if transposed else 0]


def _gathered(x_NI: mx.array, w: Weights, expert_N: mx.array, transposed: bool) -> mx.array:
    dense = w if isinstance(w, mx.array) else mx.stack([w[e].dequantize(x_NI.dtype, after=x_NI) for e in range(len(w))])
    # Without lhs_indices MLX 0.32.4 on CUDA takes wrong rows when it is told that the experts are sorted.
    row_N = mx.arange(x_NI.shape[0], dtype=mx.uint32)
    matrices = dense if transposed else dense.swapaxes(1, 2)
    return mx.gather_mm(x_NI[:, None], matrices, row_N, expert_N.astype(mx.uint32), sorted_indices=True)[:, 0]


def _groups(sizes: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) for every expert that has rows."""
    groups, first = [], 0
    for e, size in enumerate(sizes):
        if size:
            groups.append((e, slice(first, first + size)))
        first += size
    return groups


def grouped_matmul(x: mx.array, w: Weights, groups: Groups) -> mx.array:
    """`times` with its gradient: differentiable in x and a dense w; NF4 experts are frozen, and made dense again in the
    backward pass.
    """
    layer = Layer(w)

    @mx.custom_function
    def product(x: mx.array, *arrays: mx.array) -> mx.array:
        return times(x, layer.with_arrays(arrays).weight, groups)

    @product.vjp
    def product_vjp(primals, dy, _):  # type: ignore[no-untyped-def]
        x, *arrays = primals if isinstance(primals, list | tuple) else [primals]
        found = layer.with_arrays(arrays)
        dx = times(dy, found.weight, groups, transposed=True)
        return (dx, *found.gradients(x, None, dy, None, groups)) if arrays else dx

    y: mx.array = product(x, *layer.arrays())  # type: ignore[assignment]
    return y
