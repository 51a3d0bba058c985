"""Mixture of experts: top-k routing, the way of token copies to their experts and back, and the matrix product whose
rows each belong to one expert. Dropless: every copy is computed, whatever the load.

Rows lie in one of two arrangements (see `Places`). Sorted by expert, one after the other: each expert's product runs
on its own rows; for CPUs, few rows and very uneven loads. Padded: every expert has the same number of rows, that of the
busiest rounded up, and all experts are one batched product. On an H200 it runs at 590 TFLOP/s where eight products run
at 110 to 130. How many rows a padded arrangement needs only the host can know, so it costs one wait for the routing;
inside mx.compile, where there are no values, rows are sorted and `mx.gather_mm` serves.

Shapes: M tokens, E experts, k experts per token, S = M*k token copies, N rows of an arrangement (S, or E*C with C rows
for each expert), D in, F out.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from magellano.backend import mx, on_gpu
from magellano.ops.host import TracedError, evaluate
from magellano.ops.launch import Kernel, gpu_geometry
from magellano.ops.lazy import detached, plain
from magellano.ops.nf4 import Quantized

_ROUTE = Kernel("moe_route", ("logits",), ("gate", "expert", "rank", "order", "counts"))
_PLACES = Kernel("moe_places", ("expert", "rank", "order", "counts"), ("copy", "token", "place"))
_COMBINE_BACKWARD = Kernel("moe_combine_backward", ("dy", "y", "gate", "copy"), ("out", "dgate"))
_ROWS = Kernel("moe_rows", ("src", "index", "scale"), ("out",))
_THREADS = 256  # of a threadgroup on a GPU
_COUNTERS = 4096  # in threadgroup memory: experts times threads
_COLUMNS = 4096  # of one host thread
_ROUND = 64  # a padded expert's rows are a multiple of this
_MOST_PADDING = 2.0  # rows over copies, beyond which sorted rows are better: they need less memory

Groups = list[int] | mx.array  # rows per expert, or inside mx.compile the expert of each row, int32 [N]


class Routing(NamedTuple):
    """Which expert gets what. Copy i = token * k + choice."""

    gate_Mk: mx.array  # float32, sums to 1 over k
    expert_Mk: mx.array  # int32, likeliest first
    rank_Mk: mx.array  # int32, how many earlier copies went to the same expert
    order_S: mx.array  # int32, the copies sorted by expert, stable
    size_E: mx.array  # int32, copies per expert


@dataclass(frozen=True)
class Places:
    """Where token copies lie while experts work on them. `groups` as `grouped_matmul` takes it; `capacity`: rows of an
    expert if they are padded, else 0; `copy_N`, `token_N`: the copy and the token in each row, -1 in padding; `row_Mk`:
    the row of each copy.
    """

    groups: Groups
    capacity: int
    copy_N: mx.array
    token_N: mx.array
    row_Mk: mx.array


def route(logits_ME: mx.array, k: int) -> Routing:
    """The k likeliest experts of each token, and the order that sorts the token copies by expert, in one launch.

    Gates are the softmax over all experts, renormalised over the chosen: the same as softmax over the chosen ones'
    logits. Equal logits: the lower expert. Differentiable in the gates.
    """
    experts = logits_ME.shape[-1]
    assert 1 <= k <= experts, f"{k} of {experts} experts"

    @mx.custom_function
    def routed(logits_ME: mx.array) -> tuple[mx.array, ...]:
        if not logits_ME.size or plain(logits_ME):
            return _route_reference(logits_ME, k)
        return tuple(_route_kernel(logits_ME, k))

    @routed.vjp
    def routed_vjp(logits_ME: mx.array, cotangents, outputs):  # type: ignore[no-untyped-def]
        gate_Mk, expert_Mk, dgate_Mk = outputs[0], outputs[1], cotangents[0]
        chosen_Mk = gate_Mk * (dgate_Mk - (gate_Mk * dgate_Mk).sum(axis=1, keepdims=True))
        at_MkE = expert_Mk[..., None] == mx.arange(experts)
        return (at_MkE * chosen_Mk[..., None]).sum(axis=1).astype(logits_ME.dtype)

    found: tuple[mx.array, ...] = routed(logits_ME.astype(mx.float32))  # type: ignore[assignment]
    return Routing(found[0], *map(mx.stop_gradient, found[1:]))


def _route_kernel(logits_ME: mx.array, k: int) -> list[mx.array]:
    tokens, experts = logits_ME.shape
    threads = max(32, min(_THREADS, _COUNTERS // experts // 32 * 32))
    return _ROUTE(
        [logits_ME],
        template={"EXPERTS": experts, "K": k, "TH": threads},
        grid=(threads, 1, 1),
        threadgroup=(threads, 1, 1),
        host_template={"TH": 1},
        host_grid=(1, 1, 1),
        output_shapes=[(tokens, k)] * 3 + [(tokens * k,), (experts,)],
        output_dtypes=[mx.float32, *[mx.int32] * 4],
    )


def _route_reference(logits_ME: mx.array, k: int) -> tuple[mx.array, ...]:
    experts = logits_ME.shape[1]
    expert_Mk = mx.argsort(-logits_ME, axis=-1)[:, :k].astype(mx.int32)
    gate_Mk = mx.softmax(mx.take_along_axis(logits_ME, expert_Mk, axis=-1), axis=-1)
    mine_SE = (expert_Mk.reshape(-1, 1) == mx.arange(experts)).astype(mx.int32)
    rank_SE = mx.cumsum(mine_SE, axis=0) - mine_SE
    rank_Mk = (rank_SE * mine_SE).sum(axis=1).reshape(expert_Mk.shape)
    copies = mx.arange(mine_SE.shape[0])
    order_S = mx.argsort(expert_Mk.reshape(-1) * copies.size + copies).astype(mx.int32)
    return gate_Mk, expert_Mk, rank_Mk, order_S, mine_SE.sum(axis=0)


def places(routing: Routing, *, padded: bool | None = None) -> Places:
    """The arrangement for these copies; waits for the routing. `padded`: which one; by default the faster."""
    copies, (experts,) = routing.order_S.size, routing.size_E.shape
    try:
        evaluate([routing.size_E], "")
    except TracedError:
        return Places(routing.expert_Mk.reshape(-1)[routing.order_S], 0, *_places(routing, 0))
    sizes = np.array(routing.size_E).tolist()
    capacity = -(-max(sizes) // _ROUND) * _ROUND
    if padded is None:
        padded = gpu_geometry() and 0 < experts * capacity <= _MOST_PADDING * copies
    capacity = capacity if padded else 0
    return Places(sizes, capacity, *_places(routing, capacity))


def _places(routing: Routing, capacity: int) -> list[mx.array]:
    """copy_N, token_N and row_Mk (see `Places`)."""
    (tokens, k), (experts,) = routing.expert_Mk.shape, routing.size_E.shape
    copies, rows = tokens * k, experts * capacity or tokens * k
    if not copies or plain(*routing[1:]):
        return _places_reference(routing, capacity)
    threads = -(-max(copies, rows) // _THREADS) * _THREADS
    copy_N, token_N, place_S = _PLACES(
        [routing.expert_Mk.reshape(-1), routing.rank_Mk.reshape(-1), routing.order_S, routing.size_E],
        template={"EXPERTS": experts, "CAPACITY": capacity, "K": k},
        grid=(threads, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(rows,), (rows,), (copies,)],
        output_dtypes=[mx.int32] * 3,
    )
    return [copy_N, token_N, place_S.reshape(tokens, k)]


def _places_reference(routing: Routing, capacity: int) -> list[mx.array]:
    first_E = mx.cumsum(routing.size_E) - routing.size_E
    copy_N, start_E = routing.order_S, first_E
    if capacity:
        slot_C = mx.arange(capacity)
        copy_EC = routing.order_S[mx.minimum(first_E[:, None] + slot_C, routing.order_S.size - 1)]
        copy_N = mx.where(slot_C < routing.size_E[:, None], copy_EC, -1).reshape(-1)
        start_E = mx.arange(routing.size_E.size) * capacity
    token_N = mx.where(copy_N < 0, -1, copy_N // routing.expert_Mk.shape[1])
    return [copy_N, token_N, start_E[routing.expert_Mk] + routing.rank_Mk]


def dispatch(u_MD: mx.array, at: Places) -> mx.array:
    """Each row's token: [N, D], or [E, C, D] if rows are padded, zero in padding. Differentiable; no float atomics."""
    token_N1 = at.token_N[:, None]

    @mx.custom_function
    def spread(u_MD: mx.array) -> mx.array:
        return _rows(u_MD, token_N1)

    @spread.vjp
    def spread_vjp(_: mx.array, dx_ND: mx.array, __: mx.array) -> mx.array:
        return _rows(dx_ND, at.row_Mk)

    x_ND: mx.array = spread(u_MD)  # type: ignore[assignment]
    return x_ND if not at.capacity else x_ND.reshape(-1, at.capacity, x_ND.shape[1])


def combine(y: mx.array, gate_Mk: mx.array, at: Places) -> mx.array:
    """For each token the sum of its copies' rows, weighted by the gates: [M, D]. Differentiable in y and the gates."""

    @mx.custom_function
    def mix(y_ND: mx.array, gate_Mk: mx.array) -> mx.array:
        return _rows(y_ND, at.row_Mk, gate_Mk)

    @mix.vjp
    def mix_vjp(primals, dy_MD, _):  # type: ignore[no-untyped-def]
        y_ND, gate_Mk = primals
        return _combine_backward(dy_MD, y_ND, gate_Mk, at)

    y_MD: mx.array = mix(y.reshape(-1, y.shape[-1]), gate_Mk)  # type: ignore[assignment]
    return y_MD


def _combine_backward(dy_MD: mx.array, y_ND: mx.array, gate_Mk: mx.array, at: Places) -> tuple[mx.array, mx.array]:
    """The gradients of y and of the gates."""
    rows, k = y_ND.shape[0], gate_Mk.shape[1]
    if not y_ND.size or plain(dy_MD, y_ND, gate_Mk, at.copy_N):
        dy_ND = _rows(dy_MD, at.token_N[:, None])
        dgate_N = (dy_ND.astype(mx.float32) * y_ND.astype(mx.float32)).sum(axis=1)
        gate_N = gate_Mk.reshape(-1)[mx.maximum(at.copy_N, 0)]
        return dy_ND * gate_N[:, None].astype(dy_ND.dtype), dgate_N[at.row_Mk]
    dy_ND, dgate_S = _COMBINE_BACKWARD(
        [dy_MD, y_ND, gate_Mk.reshape(-1), at.copy_N],
        template={"T": y_ND.dtype, "K": k, "SG": _THREADS // 32},
        grid=(_THREADS, rows, 1),
        threadgroup=(_THREADS, 1, 1),
        host_template={"SG": 1},
        host_grid=(1, rows, 1),
        output_shapes=[y_ND.shape, (gate_Mk.size,)],
        output_dtypes=[y_ND.dtype, mx.float32],
    )
    return dy_ND, dgate_S.reshape(gate_Mk.shape)


@mx.compile
def _where_positive(y: mx.array, dy: mx.array) -> mx.array:
    return mx.where(y > 0, dy, 0)


def relu(x: mx.array) -> mx.array:
    """max(x, 0). Its gradient reads the result, so that x need not be kept, and is one pass on a GPU."""

    @mx.custom_function
    def positive(x: mx.array) -> mx.array:
        return mx.maximum(x, 0)

    @positive.vjp
    def positive_vjp(_: mx.array, dy: mx.array, y: mx.array) -> mx.array:
        if not on_gpu():  # MLX's where takes five times as long there, and mx.compile does not reach into mx.grad
            return dy * (y > 0)
        return _where_positive(y, dy).astype(dy.dtype)

    y: mx.array = positive(x)  # type: ignore[assignment]
    return y


def _rows(src_RD: mx.array, index_NJ: mx.array, scale_NJ: mx.array | None = None) -> mx.array:
    """sum over j of scale[n, j] src[index[n, j]], in src's dtype; a negative index adds nothing."""
    (rows, picks), width = index_NJ.shape, src_RD.shape[1]
    scale_NJ = None if scale_NJ is None else scale_NJ.astype(mx.float32)
    if not (rows * width * src_RD.size) or plain(src_RD, index_NJ, *([] if scale_NJ is None else [scale_NJ])):
        picked = mx.where(index_NJ[..., None] < 0, 0.0, src_RD[mx.maximum(index_NJ, 0)].astype(mx.float32))
        return (picked if scale_NJ is None else picked * scale_NJ[..., None]).sum(axis=1).astype(src_RD.dtype)
    return _ROWS(
        [src_RD, index_NJ.astype(mx.int32), mx.zeros((8,)) if scale_NJ is None else scale_NJ],
        template={"T": src_RD.dtype, "J": picks, "SCALED": scale_NJ is not None, "CPT": 1},
        grid=(-(-width // _THREADS) * _THREADS, rows, 1),
        threadgroup=(_THREADS, 1, 1),
        host_template={"CPT": _COLUMNS},
        host_grid=(-(-width // _COLUMNS), rows, 1),
        output_shapes=[(rows, width)],
        output_dtypes=[src_RD.dtype],
    )[0]


def grouped_matmul(x: mx.array, w_EFD: mx.array | Sequence[Quantized], groups: Groups) -> mx.array:
    """Each row of x times its expert's w^T. x [E, C, D], padded: all experts at once, `groups` does not matter. x [S,
    D], sorted: the first groups[0] rows belong to expert 0, and so on; sizes may be 0. Inside mx.compile groups is the
    expert of each row.

    Differentiable in x and a dense w. NF4 experts are frozen, and made dense again in the backward pass.
    """
    if x.ndim == 3:
        assert x.shape[0] == len(w_EFD), f"{x.shape} for {len(w_EFD)} experts"
        return _batched(x, w_EFD)
    if isinstance(groups, mx.array):
        return _gathered(x, w_EFD, groups)
    assert sum(groups) == x.shape[0], f"sizes {groups} do not sum to the {x.shape[0]} rows"
    assert len(groups) == len(w_EFD), f"{len(groups)} sizes for {len(w_EFD)} experts"
    return _dense(x, w_EFD, groups) if isinstance(w_EFD, mx.array) else _quantized(x, w_EFD, groups)


def _one_by_one(
    parts: Sequence[mx.array], w_EFD: Sequence[Quantized], experts: Sequence[int], transpose: bool
) -> list[mx.array]:
    """Each part times its expert's weights; an expert is made dense only when the product before is done."""
    done: list[mx.array] = []
    for a, e in zip(parts, experts, strict=True):
        w_FD = w_EFD[e].dequantize(a.dtype, after=done[-1] if done else a)
        done.append(detached(a @ (w_FD.T if transpose else w_FD)))
    return done


def _batched(x_ECD: mx.array, w_EFD: mx.array | Sequence[Quantized]) -> mx.array:
    if isinstance(w_EFD, mx.array):
        return x_ECD @ w_EFD.swapaxes(1, 2)

    def each(a_ECK: mx.array, transpose: bool) -> mx.array:
        # One batched product would be faster, but a stack of dense experts takes twice its memory and a pass to make.
        parts = list(mx.split(a_ECK.reshape(-1, a_ECK.shape[2]), len(w_EFD)))
        return mx.stack(_one_by_one(parts, w_EFD, range(len(w_EFD)), transpose))

    @mx.custom_function
    def product(x_ECD: mx.array) -> mx.array:
        return each(x_ECD, transpose=True)

    @product.vjp
    def product_vjp(x_ECD: mx.array, dy_ECF: mx.array, _: mx.array) -> mx.array:
        return each(dy_ECF, transpose=False)

    y_ECF: mx.array = product(x_ECD)  # type: ignore[assignment]
    return y_ECF


def _gathered(x_SD: mx.array, w_EFD: mx.array | Sequence[Quantized], expert_S: mx.array) -> mx.array:
    trains = isinstance(w_EFD, mx.array)
    dense_EFD = (
        w_EFD if isinstance(w_EFD, mx.array) else mx.stack([w.dequantize(x_SD.dtype, after=x_SD) for w in w_EFD])
    )

    def gather(a_SK: mx.array, w: mx.array) -> mx.array:
        # Without lhs_indices MLX 0.32.4 on CUDA takes wrong rows when it is told that the experts are sorted.
        row_S = mx.arange(a_SK.shape[0], dtype=mx.uint32)
        return mx.gather_mm(a_SK[:, None], w, row_S, expert_S.astype(mx.uint32), sorted_indices=True)[:, 0]

    @mx.custom_function
    def product(x_SD: mx.array, w_EFD: mx.array) -> mx.array:
        return gather(x_SD, w_EFD.swapaxes(1, 2))

    @product.vjp
    def product_vjp(primals, dy_SF, _):  # type: ignore[no-untyped-def]
        x_SD, w_EFD = primals
        if not trains:
            return gather(dy_SF, w_EFD), mx.zeros_like(w_EFD)
        of = [mx.where(expert_S[:, None] == e, dy_SF, 0).T @ x_SD for e in range(w_EFD.shape[0])]
        return gather(dy_SF, w_EFD), mx.stack(of)

    y_SF: mx.array = product(x_SD, mx.stop_gradient(dense_EFD) if not trains else dense_EFD)  # type: ignore[assignment]
    return y_SF


def _groups(sizes: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) for every expert that has rows."""
    groups, first = [], 0
    for e, size in enumerate(sizes):
        if size:
            groups.append((e, slice(first, first + size)))
        first += size
    return groups


def _join(parts: list[mx.array], width: int, dtype: mx.Dtype) -> mx.array:
    return mx.concatenate(parts) if parts else mx.zeros((0, width), dtype)


def _dense(x_SD: mx.array, w_EFD: mx.array, sizes: list[int]) -> mx.array:
    groups, (_, F, D) = _groups(sizes), w_EFD.shape

    # MLX's own gradient of w[e] is a zero tensor of w's whole size for each expert; ours is one stack.
    @mx.custom_function
    def product(x_SD: mx.array, w_EFD: mx.array) -> mx.array:
        each = mx.split(w_EFD, len(sizes))  # views; w_EFD[e] would be a copy
        return _join([x_SD[rows] @ each[e].reshape(F, D).T for e, rows in groups], F, x_SD.dtype)

    @product.vjp
    def product_vjp(primals, dy_SF, _):  # type: ignore[no-untyped-def]
        x_SD, w_EFD = primals
        each = mx.split(w_EFD, len(sizes))
        dx_SD = _join([dy_SF[rows] @ each[e].reshape(F, D) for e, rows in groups], D, x_SD.dtype)
        dw = {e: dy_SF[rows].T @ x_SD[rows] for e, rows in groups}
        return dx_SD, mx.stack([dw[e] if e in dw else mx.zeros((F, D), w_EFD.dtype) for e in range(len(sizes))])

    y_SF: mx.array = product(x_SD, w_EFD)  # type: ignore[assignment]
    return y_SF


def _quantized(x_SD: mx.array, w_EFD: Sequence[Quantized], sizes: list[int]) -> mx.array:
    groups, (F, D) = _groups(sizes), w_EFD[0].shape

    def one_by_one(a_SK: mx.array, transpose: bool) -> list[mx.array]:
        return _one_by_one([a_SK[rows] for _, rows in groups], w_EFD, [e for e, _ in groups], transpose)

    @mx.custom_function
    def product(x_SD: mx.array) -> mx.array:
        return _join(one_by_one(x_SD, transpose=True), F, x_SD.dtype)

    @product.vjp
    def product_vjp(x_SD: mx.array, dy_SF: mx.array, _: mx.array) -> mx.array:
        return _join(one_by_one(dy_SF, transpose=False), D, dy_SF.dtype)

    y_SF: mx.array = product(x_SD)  # type: ignore[assignment]
    return y_SF
