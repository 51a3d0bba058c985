"""One layer of all experts, dense or NF4, with or without an adapter, on the rows of a part of a room: w' x = W x +
s B (A x), with DoRA (see lora.py) each output times m / |W + s B A|.

The experts of one part have the same number of rows, so that each product is one batched product.

Shapes: M tokens, k experts per token, E experts, n experts of a part with C rows each, D in, I in and O out of a layer,
r LoRA rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

from magellano.backend import mx
from magellano.ops.around import Around
from magellano.ops.decode import matvec
from magellano.ops.launch import gpu_geometry
from magellano.ops.lazy import detached
from magellano.ops.lora import row_norms
from magellano.ops.moe import rows
from magellano.ops.nf4 import BLOCK, Parts, Quantized, nf4_matvec


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

    With DoRA: `m` [E, O, 1] and |W|^2 of each row, `squares` [E, O], both float32; or for `each` alone, which has no
    gradient, `gain` [E, O], what outputs are multiplied by.
    """

    weight: Weights
    a: mx.array | None = None
    b: mx.array | None = None
    scale: float = 0.0
    ordered: bool = False
    m: mx.array | None = None
    squares: mx.array | None = None
    gain: mx.array | None = None

    @property
    def trains(self) -> bool:
        return isinstance(self.weight, mx.array) and self.a is None

    def arrays(self) -> list[mx.array]:
        """What can have a gradient."""
        if self.a is not None and self.b is not None:
            return [self.a, self.b, *([] if self.m is None else [self.m])]
        return [cast(mx.array, self.weight)] if self.trains else []

    def with_arrays(self, arrays: Sequence[mx.array]) -> "Layer":
        if self.a is not None:
            return replace(self, a=arrays[0], b=arrays[1], m=None if self.m is None else arrays[2])
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

    def norms(self, part: Part, after: mx.array) -> mx.array | None:
        """|W + s B A| of each row for a part's experts, float32 [n, 1, O]; None without DoRA. On a GPU not made, nor W
        dense for it, before `after` is there.
        """
        if self.m is None or self.a is None or self.b is None or self.squares is None:
            return None
        a_nrI, b_nOr = _dense(self.a, part, self.ordered), _dense(self.b, part, self.ordered)
        cross_nrO = times(mx.depends(a_nrI, [after]) if gpu_geometry() else a_nrI, self.weight, part)
        return detached(row_norms(_dense(self.squares, part, False), cross_nrO, a_nrI, b_nOr, self.scale)[:, None])

    def lengths(self, part: Part) -> mx.array:
        """m of a part's experts, [n, 1, O]."""
        assert self.m is not None
        return _dense(self.m, part, self.ordered).swapaxes(1, 2)

    def scaled(self, y: mx.array, norm_n1O: mx.array | None, part: Part) -> mx.array:
        """y [n, C, O] times m / norm, in y's dtype."""
        if norm_n1O is None:
            return y
        return (y.astype(mx.float32) * (self.lengths(part) / norm_n1O)).astype(y.dtype)

    def each(self, x: mx.array, expert_S: mx.array, around: Around | None = None) -> mx.array:
        """w' x of expert expert_S[s] for each of a few rows, [S, O]; a row of x may serve several neighbours. NF4
        weights need I a multiple of 64.
        """
        around = asked = around or Around()
        if self.gain is not None:
            around = replace(around, relu=False, residual_MO=None)
        if self.a is not None:
            low = matvec(x, self.a, expert_S, replace(around, relu=False), mx.float32)
            around = replace(around, low_Mr=low, b=self.b, scale=self.scale)
        out = None if self.gain is None else mx.float32
        if isinstance(self.weight, mx.array):
            y_SO = matvec(x, self.weight, expert_S, around, out)
        else:
            y_SO = nf4_matvec(x, self.weight.parts, self.weight.shape[1], expert_S, around, out)
        return y_SO if self.gain is None else asked.end(y_SO * self.gain[expert_S], x.dtype)

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
