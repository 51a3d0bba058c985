"""Sweeps the launch geometry of nf4_matvec over production3b's shapes on a GPU: `python benchmarks/gpu_matvec.py`.

Times are those of one of many products in one compiled graph, each waiting for the one before, over matrices that
are together larger than the caches; with an adapter and a norm as in decoding. Prints a line of JSON per geometry.
"""

import itertools
import json

from magellano import nf4
from magellano.backend import mx
from magellano.benchmark import machine
from magellano.ops import nf4 as ops
from magellano.ops.around import Around

SHAPES = {"in_proj, w1": (8192, 2048), "out_proj": (2048, 4096), "w2": (2048, 8192), "head": (50257, 2048)}
LENGTH, RANK = 48, 72


def seconds(outputs: int, inputs: int, rows: int) -> float:
    """Of one product."""
    matrices = [nf4.quantize(mx.random.normal((outputs, inputs))) for _ in range(2 if outputs > 10_000 else 12)]
    x, norm = mx.random.normal((rows, inputs)).astype(mx.bfloat16), mx.ones((inputs,))
    low, b = mx.ones((rows, RANK)), mx.random.normal((outputs, RANK))
    mx.eval(x, norm, low, b, [list(q.arrays().values()) for q in matrices], [q.parts.offset for q in matrices])

    @mx.compile
    def chain(x: mx.array) -> mx.array:
        for _, q in zip(range(LENGTH), itertools.cycle(matrices), strict=False):
            y = ops.nf4_matvec(x, q.parts, outputs, None, Around(norm, 1e-5, low, b, 2.0))
            wide = y if outputs >= inputs else mx.tile(y, (1, inputs // outputs))
            x = x + 0.0 * wide[:, :inputs]
        return x

    return machine.on_device(lambda: chain(x)) / LENGTH


def main() -> None:
    copy = machine.copy_bandwidth()
    print(json.dumps({**machine.where(), "copy_gb_s": copy / 1e9}))
    for (name, (outputs, inputs)), rows in itertools.product(SHAPES.items(), (1, 4)):
        for outs, once, busy in itertools.product((2, 4), ((4, 2, 1), (2, 1), (1,)), (2048, 4096)):
            ops._GPU_OUTS, ops._GPU_AT_ONCE, ops._BUSY = outs, once, busy
            taken = seconds(outputs, inputs, rows)
            size = outputs * inputs * (0.5 + 1 / 64) + 4 * outputs * RANK
            facts = {"shape": name, "rows": rows, "outs": outs, "at_once": once[0], "busy": busy}
            print(json.dumps({**facts, "us": taken * 1e6, "share_of_copy": size / taken / copy}), flush=True)


if __name__ == "__main__":
    main()
