"""Mixture of experts: top-k routing, and the way of token copies to their experts and back. Dropless: every copy is
computed, whatever the load. What experts do with their rows is in experts.py.

Rows lie in one of two arrangements (see `Places`). Sorted by expert, one after the other: for CPUs, few rows and very
uneven loads. Padded: every expert has the same number of rows, its capacity, and all experts are one batched product.
A capacity that is chosen beforehand must hold the busiest expert; whoever chooses it compares it with `Routing.size_E`
afterwards. Without one the host waits for the routing and takes what fits; inside mx.compile, where there are no
values to wait for, rows are then sorted.

Shapes: M tokens, E experts, k experts per token, S = M*k token copies, N rows of an arrangement (S, or E*C with C rows
for each expert), D in.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from magellano.backend import mx
from magellano.ops.host import TracedError, evaluate
from magellano.ops.launch import Kernel, gpu_geometry
from magellano.ops.lazy import plain, resident

_ROUTE = Kernel("moe_route", ("logits",), ("gate", "expert", "rank", "order", "counts"))
_PLACES = Kernel("moe_places", ("expert", "rank", "order", "counts"), ("copy", "token", "place"))
_ROWS = Kernel("moe_rows", ("src", "index", "scale"), ("out",))
_THREADS, _ROUTE_THREADS, _SIMD = 256, 1024, 32  # of a threadgroup and of a simdgroup on a GPU
_COUNTERS = 8192  # in threadgroup memory: experts times threads
_COLUMNS = 4096  # of one host thread
ROUND = 64  # a padded expert's rows are a multiple of this
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
    most = min(_ROUTE_THREADS, _COUNTERS // experts // _SIMD * _SIMD, -(-tokens // _SIMD) * _SIMD)
    threads = max(_SIMD, most)
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


def even_capacity(tokens: int, k: int, experts: int) -> int:
    """A capacity that holds loads up to a quarter above the mean."""
    return -(-max(1, tokens * k * 5) // (4 * experts * ROUND)) * ROUND


def wanted_capacity(largest: int, tokens: int, k: int, experts: int) -> int:
    """The capacity that holds a load of `largest` with a little to spare, or 0 where that would pad too much."""
    capacity = -(-largest * 17 // (16 * ROUND)) * ROUND
    return capacity if experts * capacity <= _MOST_PADDING * tokens * k else 0


def places(routing: Routing, *, capacity: int | None = None, padded: bool | None = None) -> Places:
    """The arrangement for these copies. `capacity`: padded to so many rows an expert, at least as many as the busiest
    has, which is not checked here. Without it waits for the routing; then `padded` says which arrangement, by default
    the faster.
    """
    copies, (experts,) = routing.order_S.size, routing.size_E.shape
    if capacity:
        return Places([], capacity, *_places(routing, capacity))
    try:
        evaluate([routing.size_E], "")
    except TracedError:
        return Places(routing.expert_Mk.reshape(-1)[routing.order_S], 0, *_places(routing, 0))
    sizes = np.array(routing.size_E).tolist()
    capacity = -(-max(sizes) // ROUND) * ROUND
    if padded is None:
        padded = gpu_geometry() and 0 < experts * capacity <= _MOST_PADDING * copies
    capacity = capacity if padded else 0
    return Places(sizes, capacity, *_places(routing, capacity))


def _places(routing: Routing, capacity: int) -> list[mx.array]:
    """copy_N, token_N and row_Mk (see `Places`)."""
    (tokens, k), (experts,) = routing.expert_Mk.shape, routing.size_E.shape
    copies, wide = tokens * k, experts * capacity or tokens * k
    if not copies or plain(*routing[1:]):
        return _places_reference(routing, capacity)
    threads = -(-max(copies, wide) // _THREADS) * _THREADS
    copy_N, token_N, place_S = _PLACES(
        [routing.expert_Mk.reshape(-1), routing.rank_Mk.reshape(-1), routing.order_S, routing.size_E],
        template={"EXPERTS": experts, "CAPACITY": capacity, "K": k},
        grid=(threads, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(wide,), (wide,), (copies,)],
        output_dtypes=[mx.int32] * 3,
    )
    return [copy_N, token_N, place_S.reshape(tokens, k)]


def _places_reference(routing: Routing, capacity: int) -> list[mx.array]:
    first_E = mx.cumsum(routing.size_E) - routing.size_E
    copy_N, start_E, rank_Mk = routing.order_S, first_E, routing.rank_Mk
    if capacity:
        slot_C = mx.arange(capacity)
        copy_EC = routing.order_S[mx.minimum(first_E[:, None] + slot_C, routing.order_S.size - 1)]
        copy_N = mx.where(slot_C < routing.size_E[:, None], copy_EC, -1).reshape(-1)
        start_E = mx.arange(routing.size_E.size) * capacity
        rank_Mk = mx.minimum(rank_Mk, capacity - 1)  # beyond it: a place that is there, for what will not be used
    token_N = mx.where(copy_N < 0, -1, copy_N // routing.expert_Mk.shape[1])
    return [copy_N, token_N, start_E[routing.expert_Mk] + rank_Mk]


def rows(src_RD: mx.array, index_NJ: mx.array, scale_NJ: mx.array | None = None) -> mx.array:
    """sum over j of scale[n, j] src[index[n, j]], in src's dtype; a negative index adds nothing."""
    (count, picks), width = index_NJ.shape, src_RD.shape[1]
    scale_NJ = None if scale_NJ is None else scale_NJ.astype(mx.float32)
    if not (count * width * src_RD.size) or plain(src_RD, index_NJ, *([] if scale_NJ is None else [scale_NJ])):
        picked = mx.where(index_NJ[..., None] < 0, 0.0, src_RD[mx.maximum(index_NJ, 0)].astype(mx.float32))
        return (picked if scale_NJ is None else picked * scale_NJ[..., None]).sum(axis=1).astype(src_RD.dtype)
    pack = 16 // src_RD.dtype.size
    pack = pack if gpu_geometry() and width % pack == 0 else 1
    grid = (-(-width // _THREADS) * _THREADS, count, 1)
    if pack > 1:
        grid = (-(-(count * width // pack) // _THREADS) * _THREADS, 1, 1)
    return _ROWS(
        [src_RD, index_NJ.astype(mx.int32), no_scale() if scale_NJ is None else scale_NJ],
        template={"T": src_RD.dtype, "J": picks, "SCALED": scale_NJ is not None, "CPT": 1, "V": pack},
        grid=grid,
        threadgroup=(_THREADS, 1, 1),
        host_template={"CPT": _COLUMNS},
        host_grid=(-(-width // _COLUMNS), count, 1),
        output_shapes=[(count, width)],
        output_dtypes=[src_RD.dtype],
    )[0]


@functools.cache
def no_scale() -> mx.array:
    """Stands in for factors that are not used."""
    return resident(mx.array([0.0] * 8))


def spread(u_MD: mx.array, at: Places) -> mx.array:
    """Each row's token: [N, D], or [E, C, D] if rows are padded, zero in padding. No gradient of its own."""
    x_ND = rows(u_MD, at.token_N[:, None])
    return x_ND if not at.capacity else x_ND.reshape(-1, at.capacity, x_ND.shape[1])


def gather(y: mx.array, at: Places, gate_Mk: mx.array | None = None) -> mx.array:
    """For each token the sum of its copies' rows, weighted by the gates where they are given: [M, D]. No gradient of
    its own.
    """
    return rows(y.reshape(-1, y.shape[-1]), at.row_Mk, gate_Mk)
