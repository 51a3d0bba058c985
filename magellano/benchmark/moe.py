"""The experts' feed-forward w2(relu(w1(x))), from tokens to tokens, forward and backward to the inputs, against MLX's
gather_mm and slices, and the matmul rate; and the routing alone.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from magellano import nf4
from magellano.backend import compute_dtype, mx, nn, on_gpu
from magellano.benchmark import machine
from magellano.ops.experts import Layer, feed_forward
from magellano.ops.moe import Room, places, route

TOP_K, EXPERTS = 2, 8
Product = Callable[[mx.array, mx.array], mx.array]  # rows and the weights of all experts


def run() -> dict[str, Any]:
    """Times in ms; `ratio` is to gather_mm on sorted rows; the ceiling is the square product's rate. Ours includes
    routing, the wait for it, and the way to the experts and back; the others only the products on sorted rows. "As
    trained": compiled, with a room made before, so that nothing waits; `device_ms` is without the host's part.
    """
    tokens, D, F = machine.pick(512, 2048), machine.pick(512, 2048), machine.pick(1024, 8192)
    dtype = compute_dtype("auto")
    logits = mx.random.normal((tokens, EXPERTS), key=mx.random.key(0))  # the same loads each time
    u = mx.random.normal((tokens, D)).astype(dtype)
    w1, w2 = ((mx.random.normal(s) * 0.02).astype(dtype) for s in ((EXPERTS, F, D), (EXPERTS, D, F)))
    q1, q2 = (nf4.NF4Stack.of([nf4.quantize(e) for e in w]) for w in (w1, w2))
    of_row = mx.sort(route(logits, TOP_K).expert_Mk.reshape(-1))
    sizes = np.bincount(np.array(of_row), minlength=EXPERTS).tolist()
    x, row = mx.repeat(u, TOP_K, axis=0), mx.arange(tokens * TOP_K)
    mx.eval(x, w1, w2, of_row, *q1.arrays.values(), *q2.arrays.values())

    def gathered(x: mx.array, w: mx.array) -> mx.array:
        return mx.gather_mm(x[:, None], w.swapaxes(1, 2), row, of_row, sorted_indices=True)[:, 0]

    def sliced(x: mx.array, w: mx.array) -> mx.array:
        parts = zip(mx.split(x, np.cumsum(sizes)[:-1].tolist()), mx.split(w, EXPERTS), strict=True)
        return mx.concatenate([a @ e[0].T for a, e in parts])

    def plain(product: Product) -> Callable[[mx.array], mx.array]:
        return lambda x: product(nn.relu(product(x, w1)), w2)

    def ours(w1: Any, w2: Any, room: Room | None = None) -> Callable[[mx.array], mx.array]:
        def mixture(u: mx.array) -> mx.array:
            routing = route(logits, TOP_K)
            at = places(routing, room)
            return feed_forward(u, routing.gate_Mk, at, Layer(w1), Layer(w2))

        return mixture

    def both_ways(f: Callable[[mx.array], mx.array], a: mx.array, compiles: bool) -> tuple[float, float, int]:
        # The value too: the gradient of a sum alone would spare those that compute lazily their last product.
        def both(a: mx.array) -> Any:
            return mx.value_and_grad(lambda a: f(a).astype(mx.float32).sum())(a)

        call = mx.compile(both) if compiles else both

        def work() -> Any:
            return call(a)

        return machine.seconds(work, 5), machine.on_device(work) if compiles else 0.0, machine.peak(work)

    rate, operations = machine.matmul_rate(), 2 * 2 * 2 * x.shape[0] * D * F
    room = Room.padded(sizes, tokens, spare=True)
    ways = {
        "gather_mm": (plain(gathered), x),
        "slices": (plain(sliced), x),
        "ours, dense": (ours(w1, w2), u),
        "ours, NF4": (ours(q1, q2), u),
    }
    if on_gpu():
        ways["ours, dense, as trained"] = ours(w1, w2, room), u
        ways["ours, NF4, as trained"] = ours(q1, q2, room), u
    table, baseline = [], 0.0
    for what, (f, a) in ways.items():
        time, on_device, memory = both_ways(f, a, compiles="as trained" in what)
        baseline = baseline or time
        useful = {"gflop_s": operations / time / 1e9, "extra_mb": memory / 1e6}
        if on_device:
            useful |= {"device_ms": on_device * 1e3, "device_gflop_s": operations / on_device / 1e9}
        table.append(machine.row(what, time, baseline, operations / time / rate, **useful))
    routing = machine.seconds(lambda: list(route(logits, TOP_K)), 10) * 1e3
    return {
        **machine.where(),
        "copies": x.shape[0],
        "matmul_gflop_s": rate / 1e9,
        "rows_as_trained": room.rows,
        "route_ms": routing,
        "results": table,
    }
