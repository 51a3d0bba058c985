"""Mixture of experts: top-k routing, and the way of token copies to their experts and back. Dropless: every copy is
computed, whatever the load. What experts do with their rows is in experts.py.

A `Room` says which rows belong to whom: it gives each expert a number of rows, which its copies fill up from the first.
On a CPU, where a product for each expert is as good, these are exactly the rows that it needs. On a GPU a few batched
products are far better (590 TFLOP/s on an H200 where eight single ones run at 110 to 130), so experts with similar
loads get the same number of rows, and what is left over is padding. How many rows are needed only the host can know
after a wait for the routing; a room that is made beforehand, from loads seen before, saves the wait, and must be
compared with `Routing.size_E` afterwards. Inside mx.compile, without one, every expert gets room for every token.

Shapes: M tokens, E experts, k experts per token, S = M*k token copies, N rows in a room, n experts of one of its parts
with C rows each, D in.
"""

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from magellano.backend import mx
from magellano.ops import launch
from magellano.ops.host import TracedError, evaluate
from magellano.ops.launch import Kernel, gpu_geometry
from magellano.ops.lazy import constant, plain

_ROUTE = Kernel("moe_route", ("logits",), ("gate", "expert", "rank", "order", "counts"))
_PLACES = Kernel("moe_places", ("expert", "rank", "order", "counts", "start", "room"), ("copy", "token", "place"))
_ROWS = Kernel("moe_rows", ("src", "index", "scale"), ("out",))
_THREADS, _ROUTE_THREADS, _SIMD = 256, 1024, 32  # of a threadgroup and of a simdgroup on a GPU
_COUNTERS = 8192  # in threadgroup memory: experts times threads
_COLUMNS = 4096  # of one host thread
_ROUND = 64  # a padded expert's rows are a multiple of this
_SPARE = 5  # one part in so many is added to a load for which room is made beforehand
PARTS = 3  # of a padded room


class Routing(NamedTuple):
    """Which expert gets what. Copy i = token * k + choice."""

    gate_Mk: mx.array  # float32, sums to 1 over k
    expert_Mk: mx.array  # int32, likeliest first
    rank_Mk: mx.array  # int32, how many earlier copies went to the same expert
    order_S: mx.array  # int32, the copies sorted by expert, stable
    size_E: mx.array  # int32, copies per expert


@dataclass(frozen=True)
class Room:
    """Rows for every expert, in parts: (the experts of a part, the rows of each)."""

    parts: tuple[tuple[tuple[int, ...], int], ...]
    experts: int

    @classmethod
    def exact(cls, loads: Sequence[int]) -> "Room":
        """A part for each expert that gets any copies."""
        return cls(tuple(((e,), load) for e, load in enumerate(loads) if load), len(loads))

    @classmethod
    def whole(cls, experts: int, tokens: int) -> "Room":
        """Enough for whatever the routing is, since an expert gets a token once."""
        return cls(((tuple(range(experts)), tokens),), experts)

    @classmethod
    def padded(cls, loads: Sequence[int], tokens: int, *, spare: bool = False) -> "Room":
        """Parts that hold these loads, with the fewest rows; `spare`: and a fifth more. None has more than its share of
        the experts, for a part's weights are dense at once.
        """
        experts = sorted(range(len(loads)), key=lambda e: (-loads[e], e))
        wanted = [load + load // _SPARE * spare for load in (loads[e] for e in experts)]
        rows = [min(-(-max(load, 1) // _ROUND) * _ROUND, tokens) for load in wanted]
        parts, most = min(PARTS, len(rows)), most_together(len(rows))
        ways = (
            list(itertools.pairwise((0, *c, len(rows)))) for c in itertools.combinations(range(1, len(rows)), parts - 1)
        )
        edges = min(
            (edges for edges in ways if all(b - a <= most for a, b in edges)),
            key=lambda edges: sum((b - a) * rows[a] for a, b in edges),
        )
        return cls(tuple((tuple(sorted(experts[a:b])), rows[a]) for a, b in edges), len(loads))

    @property
    def rows(self) -> int:
        """Of all experts together, N."""
        return sum(len(experts) * rows for experts, rows in self.parts)

    @property
    def order(self) -> tuple[int, ...]:
        """The experts as their rows lie."""
        return tuple(e for experts, _ in self.parts for e in experts)

    def of_each(self) -> tuple[list[int], list[int]]:
        """Each expert's first row and how many rows it has."""
        start, size, first = [0] * self.experts, [0] * self.experts, 0
        for experts, rows in self.parts:
            for e in experts:
                start[e], size[e] = first, rows
                first += rows
        return start, size

    def holds(self, loads: Sequence[int]) -> bool:
        return all(load <= size for load, size in zip(loads, self.of_each()[1], strict=True))


def most_together(experts: int) -> int:
    """How many experts a part of a padded room has at most."""
    return -(-experts // PARTS)


@dataclass(frozen=True)
class Places:
    """Where token copies lie while experts work on them: `copy_N`, `token_N`: the copy and the token in each row, -1 in
    padding; `row_Mk`: the row of each copy.
    """

    room: Room
    copy_N: mx.array
    token_N: mx.array
    row_Mk: mx.array


def route(logits_ME: mx.array, k: int, *, no_gradient: bool = False) -> Routing:
    """The k likeliest experts of each token, and the order that sorts the token copies by expert, in one launch.

    Gates are the softmax over all experts, renormalised over the chosen: the same as softmax over the chosen ones'
    logits. Equal logits: the lower expert. Differentiable in the gates, but with `no_gradient`.
    """
    experts = logits_ME.shape[-1]
    assert 1 <= k <= experts, f"{k} of {experts} experts"
    if no_gradient and logits_ME.size and not plain(logits_ME):
        return Routing(*_route_kernel(logits_ME.astype(mx.float32), k))

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
    threads = launch.threads(max(_SIMD, most))
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


def places(routing: Routing, room: Room | None = None) -> Places:
    """The rows for these copies in `room`, which must hold them; without one, waits for the routing and makes it."""
    (tokens, k), (experts,) = routing.expert_Mk.shape, routing.size_E.shape
    if room is None:
        try:
            evaluate([routing.size_E], "")
        except TracedError:
            room = Room.whole(experts, tokens)
        else:
            loads = np.array(routing.size_E).tolist()
            room = Room.padded(loads, tokens) if gpu_geometry() else Room.exact(loads)
    copies, wide = tokens * k, room.rows
    if not copies or plain(*routing[1:]):
        return Places(room, *_places_reference(routing, room))
    threads = -(-max(copies, wide) // _THREADS) * _THREADS
    copy_N, token_N, place_S = _PLACES(
        [routing.expert_Mk.reshape(-1), routing.rank_Mk.reshape(-1), routing.order_S, routing.size_E, *_layout(room)],
        template={"EXPERTS": experts, "K": k},
        grid=(threads, 1, 1),
        threadgroup=(_THREADS, 1, 1),
        output_shapes=[(wide,), (wide,), (copies,)],
        output_dtypes=[mx.int32] * 3,
    )
    return Places(room, copy_N, token_N, place_S.reshape(tokens, k))


@functools.lru_cache(maxsize=1024)
def _layout(room: Room) -> tuple[mx.array, mx.array]:
    """`Room.of_each` as arrays and not as constants of the kernel, which would be compiled anew for each."""
    start, size = room.of_each()
    return constant(start, mx.int32), constant(size, mx.int32)


def _places_reference(routing: Routing, room: Room) -> list[mx.array]:
    first_E = mx.cumsum(routing.size_E) - routing.size_E
    last = max(0, routing.order_S.size - 1)
    copies = [mx.zeros((0,), mx.int32)]
    for experts, rows in room.parts:
        which, slot_C = mx.array(experts), mx.arange(rows)
        copy_nC = routing.order_S[mx.minimum(first_E[which][:, None] + slot_C, last)]
        copies.append(mx.where(slot_C < routing.size_E[which][:, None], copy_nC, -1).reshape(-1))
    copy_N = mx.concatenate(copies)
    token_N = mx.where(copy_N < 0, -1, copy_N // routing.expert_Mk.shape[1])
    start_E, size_E = (mx.array(values, dtype=mx.int32) for values in room.of_each())
    # A copy for which there is no room gets a row that is there: what is computed then will not be used.
    rank_Mk = mx.minimum(routing.rank_Mk, size_E[routing.expert_Mk] - 1)
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
        [src_RD, index_NJ.astype(mx.int32), _no_scale() if scale_NJ is None else scale_NJ],
        template={"T": src_RD.dtype, "J": picks, "SCALED": scale_NJ is not None, "CPT": 1, "V": pack},
        grid=grid,
        threadgroup=(_THREADS, 1, 1),
        host_template={"CPT": _COLUMNS},
        host_grid=(-(-width // _COLUMNS), count, 1),
        output_shapes=[(count, width)],
        output_dtypes=[src_RD.dtype],
    )[0]


@functools.cache
def _no_scale() -> mx.array:
    """Stands in for factors that are not used."""
    return constant([0.0] * 8, mx.float32)
