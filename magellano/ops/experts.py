"""The experts' two layers over their own rows (see moe.py for how the rows come there), dense or NF4, with or without
adapters: y = sum over a token's experts of gate * w2'(relu(w1'(u))), w' x = W x + s B (A x), with DoRA each output
times m / |W + s B A| (see expert_layer.py).

Shapes: M tokens, k experts per token, E experts, n experts of a part with C rows each, N rows in all, D in, F hidden,
I in and O out of a layer, r LoRA rank.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from magellano.backend import mx
from magellano.names import Hidden
from magellano.ops import gated
from magellano.ops.around import Around
from magellano.ops.expert_layer import Layer, Part
from magellano.ops.launch import Kernel, gpu_geometry
from magellano.ops.lazy import detached, plain
from magellano.ops.moe import Places, rows

_HIDDEN_BACKWARD = Kernel("moe_hidden_backward", ("da", "a", "gate", "copy"), ("dh", "dgate"))
_MIX = Kernel("moe_mix", ("h", "gate", "y"), ("out",))
_THREADS = 256  # of a threadgroup on a GPU
_HOST_COLUMNS = 1024  # of one host thread


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

    def layers(arrays: Sequence[mx.array]) -> tuple[Layer, Layer]:
        return w1.with_arrays(arrays[:split]), w2.with_arrays(arrays[split:])

    @mx.custom_function
    def mixture(u_MD: mx.array, gate_Mk: mx.array, *arrays: mx.array) -> tuple[mx.array, ...]:
        pair = layers(arrays)
        y, kept = [], []
        for part in _parts(at):
            made, kept_part = _forward(part.spread(u_MD), part, *pair, unread, hidden)
            y += [] if made is None else [made]
            kept += [value for value in kept_part if value is not None]
        # back to the tokens, weighted by the gates
        y_MD = mx.zeros(u_MD.shape, u_MD.dtype) if unread else _gather(y, at, u_MD, gate_Mk)
        return y_MD, *kept

    @mixture.vjp
    def mixture_vjp(primals, cotangents, outputs):  # type: ignore[no-untyped-def]
        u_MD, gate_Mk, *arrays = primals
        first, second = layers(arrays)
        left, dy_MD = iter(outputs[1:]), cotangents[0]
        dx, dgate, found = [], [mx.zeros((0,))], []
        for part in _parts(at):
            kept = _Kept(*(next(left) if there else None for there in _Kept.there(first, second)))
            dx_part, dgate_part, more = _backward(kept, part.spread(dy_MD), gate_Mk, part, first, second, hidden)
            dx.append(dx_part)
            dgate.append(dgate_part)
            found.append((part, more))
            if gpu_geometry():  # a part is done with before the next begins, which spares memory
                dy_MD = mx.depends(dy_MD, [dx_part, dgate_part, *more])
        dgate_Mk = mx.concatenate(dgate)[at.row_Mk] if at.row_Mk.size else mx.zeros(gate_Mk.shape)
        ordered = [first.ordered] * split + [second.ordered] * (len(arrays) - split)
        grads = [_all(found, number, array, ordered[number]) for number, array in enumerate(arrays)]
        return _gather(dx, at, u_MD), dgate_Mk, *grads

    outputs: tuple[mx.array, ...] = mixture(u_MD, gate_Mk, *w1.arrays(), *w2.arrays())  # type: ignore[assignment]
    return outputs[0]


class _Kept(NamedTuple):
    """What a part's forward leaves for its backward: its rows of u, a = relu(h) or h of gated experts, A u, and with
    DoRA the norms of both layers and what the second multiplies by m / norm.
    """

    x: Any
    h: Any
    low1: Any
    norm1: Any
    z2: Any
    norm2: Any

    @staticmethod
    def there(first: Layer, second: Layer) -> tuple[bool, ...]:
        """Which of them there are."""
        two = second.m is not None
        return True, True, first.a is not None, first.m is not None, two, two


def _forward(
    x: mx.array, part: Part, first: Layer, second: Layer, unread: bool, hidden: Hidden
) -> tuple[mx.array | None, _Kept]:
    """The part's rows of y, not yet weighted, from those of u."""
    # 1. up, and what is positive stays
    h, low1 = first(x, part)
    norm1 = first.norms(part, h)
    h = first.scaled(h, norm1, part)
    h = detached(h if hidden.gated else gated.forward(h, hidden))
    if unread and second.m is None:
        return None, _Kept(x, h, low1, norm1, None, None)
    # 2. down
    z2, _ = second(_active(h, hidden), part)
    norm2 = second.norms(part, z2)
    if norm2 is not None:
        z2 = detached(z2)
    y = None if unread else second.scaled(z2, norm2, part)
    return y, _Kept(x, h, low1, norm1, None if norm2 is None else z2, norm2)


def _backward(
    kept: _Kept, dy: mx.array, gate_Mk: mx.array, part: Part, first: Layer, second: Layer, hidden: Hidden
) -> tuple[mx.array, mx.array, list[mx.array]]:
    """The gradients of the part's rows of u, of the gates by row, and of the layers' arrays, from that of its rows of y
    before the gates.
    """
    x, h, low1, norm1, z2, norm2 = kept
    a = _active(h, hidden)
    dm: list[list[mx.array]] = [[], []]  # as soon as may be, for on a CPU they would keep what they are made of
    if norm2 is not None:
        dm[1] = [detached((_products(part.weigh(dy, gate_Mk), z2) / norm2).swapaxes(1, 2))]
    dz = dy if norm2 is None else detached(second.scaled(dy, norm2, part))
    da, dlow2 = second.back(dz, part)
    dh, dgate = hidden_backward(da, h, gate_Mk, part, hidden)
    if norm1 is not None:  # of h = m z / norm there is relu(h) = h where dh is not zero, so z / norm is it by m
        m_n1F = first.lengths(part)
        dm[0] = [detached(mx.where(m_n1F == 0, 0.0, _products(dh, h) / m_n1F).swapaxes(1, 2))]
        dh = detached(first.scaled(dh, norm1, part))
    dx, dlow1 = first.back(dh, part)
    more = [*first.gradients(x, low1, dh, dlow1), *dm[0]]
    if second.a is not None and dlow2 is not None:  # the gates weigh the thin factors
        low2, dlow2 = part.weigh(second.low(a, part), gate_Mk), part.weigh(dlow2, gate_Mk)
        more += second.gradients(a, low2, dz, dlow2)
    elif second.trains:
        more += second.gradients(a, None, part.weigh(dy, gate_Mk), None)
    return dx, dgate, [*more, *dm[1]]


def _active(h: mx.array, hidden: Hidden) -> mx.array:
    """What the second layer takes, of what is kept: relu was taken already."""
    return gated.forward(h, hidden) if hidden.gated else h


def _products(p: mx.array, q: mx.array) -> mx.array:
    """The sums of p q over the rows, float32 [n, 1, O]."""
    return (p.astype(mx.float32) * q.astype(mx.float32)).sum(axis=1, keepdims=True)


def feed_forward_few(
    h_MD: mx.array, norm: Around, gate_Mk: mx.array, expert_Mk: mx.array, w1: Layer, w2: Layer
) -> mx.array:
    """h + the mixture's output for norm(h), in h's dtype, for few rows, as in decoding: every token copy reads its
    expert, so that nothing is sorted and nothing waits for the routing. No gradient.
    """
    expert_S = expert_Mk.reshape(-1)
    a_SF = w1.each(h_MD, expert_S, replace(norm, relu=True))
    return _mix(h_MD, gate_Mk, w2.each(a_SF, expert_S))


def _mix(h_MD: mx.array, gate_Mk: mx.array, y_SD: mx.array) -> mx.array:
    """h + each row's copies in y times their gates."""
    (M, k), D = gate_Mk.shape, h_MD.shape[1]
    if plain(h_MD, gate_Mk, y_SD):
        y_MkD = y_SD.reshape(M, k, D).astype(mx.float32)
        return (h_MD.astype(mx.float32) + (gate_Mk[..., None] * y_MkD).sum(axis=1)).astype(h_MD.dtype)
    out_MD: mx.array = _MIX(
        [h_MD, gate_Mk, y_SD],
        template={"T": h_MD.dtype, "D_SIZE": D, "K": k, "CPT": 1},
        grid=(-(-D // _THREADS) * _THREADS, M, 1),
        threadgroup=(_THREADS, 1, 1),
        host_template={"CPT": _HOST_COLUMNS},
        host_grid=(-(-D // _HOST_COLUMNS), M, 1),
        output_shapes=[(M, D)],
        output_dtypes=[h_MD.dtype],
    )[0]
    return out_MD


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
