"""Experts' grouped product, forward and backward to the inputs, against MLX's gather_mm and slices, and the matmul
rate.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from magellano import nf4
from magellano.backend import compute_dtype, mx
from magellano.benchmark import machine
from magellano.ops import grouped_matmul, route

TOP_K, EXPERTS = 2, 8


def run() -> dict[str, Any]:
    """Times in ms; `ratio` is to gather_mm on sorted rows; the ceiling is the square product's rate."""
    tokens, D, F = machine.pick(512, 2048), machine.pick(512, 2048), machine.pick(1024, 8192)
    dtype = compute_dtype("auto")
    _, expert = route(mx.random.normal((tokens, EXPERTS)), TOP_K)
    of_row = mx.sort(expert.reshape(-1))
    sizes = np.bincount(np.array(of_row), minlength=EXPERTS).tolist()
    x, w = mx.random.normal((tokens * TOP_K, D)).astype(dtype), mx.random.normal((EXPERTS, F, D)).astype(dtype)
    experts = [nf4.quantize(e) for e in w]
    mx.eval(x, w, of_row, *(list(e.arrays().values()) for e in experts))

    def gathered(x: mx.array) -> mx.array:
        return mx.gather_mm(x[:, None], w.swapaxes(1, 2), rhs_indices=of_row, sorted_indices=True)[:, 0]

    def sliced(x: mx.array) -> mx.array:
        ends = [sum(sizes[: e + 1]) for e in range(EXPERTS)]
        return mx.concatenate([x[end - n : end] @ w[e].T for e, (n, end) in enumerate(zip(sizes, ends, strict=True))])

    def both_ways(product: Callable[[mx.array], mx.array]) -> float:
        return machine.seconds(lambda: mx.grad(lambda x: product(x).astype(mx.float32).sum())(x), 3)

    rate, operations = machine.matmul_rate(), 2 * 2 * x.shape[0] * D * F
    baseline = both_ways(gathered)
    ways = {
        "gather_mm": gathered,
        "slices": sliced,
        "grouped_matmul, dense": lambda x: grouped_matmul(x, w, sizes),
        "grouped_matmul, NF4": lambda x: grouped_matmul(x, experts, sizes),
    }
    table = []
    for what, product in ways.items():
        time = both_ways(product)
        table.append(machine.row(what, time, baseline, operations / time / rate, gflop_s=operations / time / 1e9))
    return {**machine.where(), "rows": x.shape[0], "matmul_gflop_s": rate / 1e9, "results": table}
