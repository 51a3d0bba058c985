"""The experts' two layers over their own rows (see moe.py for how the rows come there), dense or NF4, with or without
adapters: y = sum over a token's experts of gate * w2'(relu(w1'(u))), w' x = W x + s B (A x).

The experts of one part of a room have the same number of rows, so that each product is one batched product.

Shapes: M tokens, k experts per token, E experts, n experts of a part with C rows each, N rows in all, D in, F hidden,
I in and O out of a layer, r LoRA rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

from magellano.backend import mx
from magellano.names import Hidden
from magellano.ops import gated
from magellano.ops.around import Around
from magellano.ops.decode import matvec
from magellano.ops.launch import Kernel, gpu_geometry
from magellano.ops.lazy import detached, plain
from magellano.ops.moe import Places, rows
from magellano.ops.nf4 import BLOCK, Parts, Quantized, nf4_matvec

_HIDDEN_BACKWARD = Kernel("moe_hidden_backward", ("da", "a", "gate", "copy"), ("dh", "dgate"))
_THREADS = 256  # of a threadgroup on a GPU


class Stack(Protocol):
    """What is needed of E NF4 matrices of one shape (see magellano/nf4.py)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def parts(self) -> Parts: ...

    def __len__(self) -> int: ...

    def __getitem__(self, e: int, /) -> Quantized: ...

    def dequantize(
        self, dtype: mx.Dtype = ..., after: mx.array | None = None, which: Sequence[int] | None = None
    ) -> mx.array: ...


Weights = mx.array | Stack


@dataclass(frozen=True)
class Part:
    """The rows of a part of a room: its n experts, the place of the first in the room's order, and the copy and the
    token in each row.
    """

    experts: tuple[int, ...]
    first: int
    copy_R: mx.array
    token_R: mx.array

    def spread(self, u_MD: mx.array) -> mx.array:
        """Each row's token, [n, C, D]; zero in padding."""
        return rows(u_MD, self.token_R[:, None]).reshape(len(self.experts), -1, u_MD.shape[1])

    def gates(self, gate_Mk: mx.array) -> mx.array:
        """Of each row's copy, [R]; of padding anything."""
        return gate_Mk.reshape(-1)[mx.maximum(self.copy_R, 0)]

    def weigh(self, y: mx.array, gate_Mk: mx.array) -> mx.array:
        """Each row times the gate of its copy; padding is zero already."""
        gate_R = self.gates(gate_Mk)
        return y * gate_R.reshape(len(self.experts), -1, 1).astype(y.dtype)


@dataclass(frozen=True)
class Layer:
    """One layer of all experts: W [E, O, I], dense or NF4, and its adapter A [E, r, I], B [E, O, r] with s, if any. NF4
    weights and those under an adapter are frozen. `ordered`: the experts of what trains lie in the room's order, so
    that those of a part lie side by side.
    """

    weight: Weights
    a: mx.array | None = None
    b: mx.array | None = None
    scale: float = 0.0
    ordered: bool = False

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
            return replace(self, a=arrays[0], b=arrays[1])
        return replace(self, weight=arrays[0]) if self.trains else self

    def __call__(self, x: mx.array, part: Part) -> tuple[mx.array, mx.array | None]:
        """w' x [n, C, O] for x [n, C, I], and A x."""
        y = times(x, self.weight, part, ordered=self.ordered and self.trains)
        if self.a is None or self.b is None:
            return y, None
        low = self.low(x, part)
        return add_times(y, low, self.b, part, self.scale, ordered=self.ordered), low

    def low(self, x: mx.array, part: Part) -> mx.array:
        """A x."""
        assert self.a is not None
        return times(x, self.a, part, ordered=self.ordered)

    def each(self, x: mx.array, expert_S: mx.array, around: Around | None = None) -> mx.array:
        """w' x of expert expert_S[s] for each of a few rows, [S, O]; a row of x may serve several neighbours. NF4
        weights need I a multiple of 64.
        """
        around = around or Around()
        if self.a is not None:
            low = matvec(x, self.a, expert_S, replace(around, relu=False), mx.float32)
            around = replace(around, low_Mr=low, b=self.b, scale=self.scale)
        if isinstance(self.weight, mx.array):
            return matvec(x, self.weight, expert_S, around)
        return nf4_matvec(x, self.weight.parts, self.weight.shape[1], expert_S, around)

    @property
    def takes_each(self) -> bool:
        """Whether `each` can serve."""
        return isinstance(self.weight, mx.array) or self.weight.shape[2] % BLOCK == 0

    def back(self, dy: mx.array, part: Part) -> tuple[mx.array, mx.array | None]:
        """The gradient of x, and that of A x."""
        dx = times(dy, self.weight, part, transposed=True, ordered=self.ordered and self.trains)
        if self.a is None or self.b is None:
            return dx, None
        dlow = self.scale * times(dy, self.b, part, transposed=True, ordered=self.ordered)
        return add_times(dx, dlow, self.a, part, 1.0, transposed=True, ordered=self.ordered), dlow

    def gradients(self, x: mx.array, low: mx.array | None, dy: mx.array, dlow: mx.array | None) -> list[mx.array]:
        """Of `arrays`, for a part's experts: [n, .., ..]."""
        if low is not None and dlow is not None:
            return [outer(dlow, x), outer(dy, self.scale * low)]
        return [outer(dy, x)] if self.trains else []


def feed_forward(
    u_MD: mx.array, gate_Mk: mx.array, at: Places, w1: Layer, w2: Layer, *, unread: bool = False,
    hidden: Hidden = Hidden.RELU,
) -> mx.array:  # fmt: skip
    """The mixture's output y_MD in u's dtype. Differentiable in u, the gates, adapters, and weights that are dense and
    without an adapter. `unread`: the caller wants gradients only, so y may be left out. `hidden`: in relu's place.

    The gradient of a gate needs no second product: the output is linear in a = relu(h), so it is da . a, where da is
    what the output's gradient becomes at a. Rows come back unweighted, and the gates count once, in the last sum.
    """
    split = len(w1.arrays())
    act = (lambda h: gated.forward(h, hidden)) if hidden.gated else (lambda h: h)  # of what is kept

    @mx.custom_function
    def mixture(u_MD: mx.array, gate_Mk: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
        first, second = w1.with_arrays(arrays[:split]), w2.with_arrays(arrays[split:])
        y, kept = [], []
        for part in _parts(at):
            # 1. the copies go to their experts
            x = part.spread(u_MD)
            # 2. up, and what is positive stays
            h, low1 = first(x, part)
            h = detached(h if hidden.gated else mx.maximum(h, 0))
            kept += [value for value in (x, h, low1) if value is not None]
            # 3. down
            if not unread:
                y.append(second(act(h), part)[0])
        # 4. back to the tokens, weighted by the gates
        y_MD = mx.zeros(u_MD.shape, u_MD.dtype) if unread else _gather(y, at, u_MD, gate_Mk)
        return y_MD, *kept

    @mixture.vjp
    def mixture_vjp(primals, cotangents, outputs):  # type: ignore[no-untyped-def]
        u_MD, gate_Mk, *arrays = primals
        first, second = w1.with_arrays(arrays[:split]), w2.with_arrays(arrays[split:])
        kept, dy_MD = iter(outputs[1:]), cotangents[0]
        dx, dgate, found = [], [mx.zeros((0,))], []
        for part in _parts(at):
            x, h, low1 = next(kept), next(kept), (next(kept) if first.a is not None else None)
            a, dy = act(h), part.spread(dy_MD)
            da, dlow2 = second.back(dy, part)
            dh, dgate_part = hidden_backward(da, h, gate_Mk, part, hidden)
            dx_part, dlow1 = first.back(dh, part)
            dx.append(dx_part)
            dgate.append(dgate_part)
            more = first.gradients(x, low1, dh, dlow1)
            if second.a is not None and dlow2 is not None:  # the gates weigh the thin factors
                low2, dlow2 = part.weigh(second.low(a, part), gate_Mk), part.weigh(dlow2, gate_Mk)
                more += second.gradients(a, low2, dy, dlow2)
            elif second.trains:
                more += second.gradients(a, None, part.weigh(dy, gate_Mk), None)
            found.append((part, more))
            if gpu_geometry():  # a part is done with before the next begins, which spares memory
                dy_MD = mx.depends(dy_MD, [dx_part, dgate_part, *more])
        dgate_Mk = mx.concatenate(dgate)[at.row_Mk] if at.row_Mk.size else mx.zeros(gate_Mk.shape)
        ordered = [first.ordered] * split + [second.ordered] * (len(arrays) - split)
        grads = [_all(found, number, array, ordered[number]) for number, array in enumerate(arrays)]
        return _gather(dx, at, u_MD), dgate_Mk, *grads

    outputs: tuple[mx.array, ...] = mixture(u_MD, gate_Mk, *w1.arrays(), *w2.arrays())  # type: ignore[assignment]
    return outputs[0]


def feed_forward_few(
    h_MD: mx.array, norm: Around, gate_Mk: mx.array, expert_Mk: mx.array, w1: Layer, w2: Layer
) -> mx.array:
    """h + the mixture's output for norm(h), in h's dtype, for few rows, as in decoding: every token copy reads its
    expert, so that nothing is sorted and nothing waits for the routing. No gradient.
    """
    (M, k), D = gate_Mk.shape, h_MD.shape[1]
    expert_S = expert_Mk.reshape(-1)
    a_SF = w1.each(h_MD, expert_S, replace(norm, relu=True))
    y_MkD = w2.each(a_SF, expert_S).reshape(M, k, D)
    made = h_MD.reshape(M, 1, D).astype(mx.float32)
    for gate, y in zip(mx.split(gate_Mk.reshape(M, k, 1), k, axis=1), mx.split(y_MkD, k, axis=1), strict=True):
        made = made + gate * y.astype(mx.float32)
    return made.astype(h_MD.dtype).reshape(M, D)


def _parts(at: Places) -> Iterator[Part]:
    row = place = 0
    for experts, size in at.room.parts:
        last = row + len(experts) * size
        yield Part(experts, place, at.copy_N[row:last], at.token_N[row:last])
        row, place = last, place + len(experts)


def _gather(parts: list[mx.array], at: Places, u_MD: mx.array, gate_Mk: mx.array | None = None) -> mx.array:
    """For each token the sum of its copies' rows, weighted by the gates where they are given: as u_MD."""
    if not parts:
        return mx.zeros_like(u_MD)
    return rows(mx.concatenate([p.reshape(-1, u_MD.shape[1]) for p in parts]), at.row_Mk, gate_Mk)


def _all(found: list[tuple[Part, list[mx.array]]], number: int, like: mx.array, ordered: bool) -> mx.array:
    """The gradient of array `number` for all experts, from those of the parts; zero where an expert has no rows."""
    if len(found) == 1 and (ordered or found[0][0].experts == tuple(range(like.shape[0]))):
        return found[0][1][number]
    if ordered:
        return mx.concatenate([gradients[number] for _, gradients in found])
    each: dict[int, mx.array] = {}
    for part, gradients in found:
        each.update(zip(part.experts, mx.split(gradients[number], len(part.experts)), strict=True))
    nothing = mx.zeros((1, *like.shape[1:]), like.dtype)
    return mx.concatenate([each.get(e, nothing) for e in range(like.shape[0])])


def hidden_backward(
    da: mx.array, a: mx.array, gate_Mk: mx.array, part: Part, hidden: Hidden = Hidden.RELU
) -> tuple[mx.array, mx.array]:
    """dh = gate * da where a > 0, shaped as a, and for each row da . a, float32; gated experts give h as `a`."""
    if hidden.gated:
        return gated.backward(da, a, part.gates(gate_Mk), hidden)
    width, shape, copy_R = a.shape[-1], a.shape, part.copy_R
    da, a = da.reshape(-1, width), a.reshape(-1, width)
    if plain(da, a, gate_Mk, copy_R):
        gate_R = mx.where(copy_R < 0, 0.0, gate_Mk.reshape(-1)[mx.maximum(copy_R, 0)])
        dgate_R = (da.astype(mx.float32) * a.astype(mx.float32)).sum(axis=1)
        dh = mx.where(a > 0, gate_R[:, None] * da.astype(mx.float32), 0.0).astype(a.dtype)
        return dh.reshape(shape), dgate_R
    pack = 16 // a.dtype.size
    pack = pack if gpu_geometry() and width % pack == 0 else 1
    dh, dgate_R = _HIDDEN_BACKWARD(
        [da, a, gate_Mk.reshape(-1), copy_R],
        template={"T": a.dtype, "SG": _THREADS // 32, "V": pack},
        grid=(a.shape[0] * _THREADS, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        host_template={"SG": 1},
        host_grid=(a.shape[0], 1, 1),
        output_shapes=[a.shape, (a.shape[0],)],
        output_dtypes=[a.dtype, mx.float32],
    )
    return dh.reshape(shape), dgate_R


def times(
    x: mx.array, w: Weights, part: Part, *, transposed: bool = False, ordered: bool = False
) -> mx.array:  # fmt: skip
    """x [n, C, I] times W^T of each of the part's experts, or W if `transposed`. No gradient of its own."""
    experts = part.experts
    assert x.shape[0] == len(experts), f"{x.shape} for experts {experts}"
    if isinstance(w, mx.array):
        w_nOI = _dense(w, part, ordered)
    elif gpu_geometry():  # all are made dense in one launch and multiplied in another
        w_nOI = w.dequantize(x.dtype, after=x, which=experts)
    else:
        x_CI = [one.squeeze(0) for one in mx.split(x, len(experts))]
        each = [_one(one, w[e], transposed) for one, e in zip(x_CI, experts, strict=True)]
        return each[0][None] if len(each) == 1 else mx.stack(each)
    if len(experts) == 1 and not gpu_geometry():
        w_OI = w_nOI.squeeze(0)  # x[0] would copy
        return (x.squeeze(0) @ (w_OI if transposed else w_OI.T))[None]
    return x @ (w_nOI if transposed else w_nOI.swapaxes(1, 2))


def _one(x_CI: mx.array, w: Quantized, transposed: bool) -> mx.array:
    w_OI = w.dequantize(x_CI.dtype, after=x_CI)
    return detached(x_CI @ (w_OI if transposed else w_OI.T))


def _dense(w_EOI: mx.array, part: Part, ordered: bool) -> mx.array:
    """The matrices of the part's experts: a view where they lie side by side, else a copy."""
    if ordered:
        return _run(w_EOI, part.first, part.first + len(part.experts))
    first, last = part.experts[0], part.experts[-1] + 1
    if part.experts == tuple(range(first, last)):
        return _run(w_EOI, first, last)
    return mx.concatenate([_run(w_EOI, e, e + 1) for e in part.experts])


def _run(w_EOI: mx.array, first: int, last: int) -> mx.array:
    return w_EOI if last - first == w_EOI.shape[0] else mx.split(w_EOI, [first, last])[1]  # a view; w[e] would copy


def add_times(
    y: mx.array, x: mx.array, w_EOI: mx.array, part: Part, scale: float, *, transposed: bool = False, ordered: bool
) -> mx.array:
    """y + scale * `times`, in one pass on a GPU."""
    if not gpu_geometry():
        return y + times(scale * x if scale != 1.0 else x, w_EOI, part, transposed=transposed, ordered=ordered)
    w_nOI = _dense(w_EOI, part, ordered)
    return mx.addmm(y, x, w_nOI if transposed else w_nOI.swapaxes(1, 2), alpha=scale)


def outer(p: mx.array, q: mx.array) -> mx.array:
    """For each expert p^T q over its rows: [n, P, Q] from [n, C, P] and [n, C, Q]."""
    if p.shape[0] == 1 and not gpu_geometry():
        return (p.squeeze(0).T @ q.squeeze(0))[None]
    return p.swapaxes(1, 2) @ q
