"""Linear + cross-entropy, forward and backward, against the plain formula, the matmul rate, and the memory of all
logits.
"""

from typing import Any

from magellano import nf4
from magellano.backend import compute_dtype, mx, nn
from magellano.benchmark import machine
from magellano.ops import linear_cross_entropy


def run() -> dict[str, Any]:
    """Times in ms, memory in MB; `ratio` is to MLX's loss on all logits; the ceiling is the square product's rate."""
    chunk = machine.pick(128, 512)
    rows, D, V = machine.pick(512, 2048), machine.pick(256, 2048), machine.pick(16001, 50257)
    dtype = compute_dtype("auto")
    x, w = mx.random.normal((rows, D)).astype(dtype), (mx.random.normal((V, D)) * 0.02).astype(dtype)
    target, weight, q = mx.random.randint(0, V, (rows,)), mx.ones((rows,)), nf4.quantize(w)
    mx.eval(x, w, target, weight, *q.arrays().values())

    def plain(x: mx.array) -> mx.array:
        return nn.losses.cross_entropy((x @ w.T).astype(mx.float32), target, reduction="sum")

    ways = {
        "all logits": plain,
        "in chunks, dense": lambda x: linear_cross_entropy(x, w, target, weight, chunk=chunk, frozen=True),
        "in chunks, NF4": lambda x: linear_cross_entropy(x, q, target, weight, chunk=chunk),
    }
    rate, operations, table = machine.matmul_rate(), 2 * 2 * rows * D * V, []
    baseline = machine.seconds(lambda: mx.value_and_grad(plain)(x), 2)
    for what, loss in ways.items():
        both = mx.value_and_grad(loss)
        time, memory = machine.seconds(lambda both=both: both(x), 4), machine.peak(lambda both=both: both(x))  # type: ignore[misc]
        table.append(machine.row(what, time, baseline, operations / time / rate, extra_mb=memory / 1e6))
    logits = 4 * rows * V / 1e6
    return {**machine.where(), "all_logits_mb": logits, "matmul_gflop_s": rate / 1e9, "results": table}
