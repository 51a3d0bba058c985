"""Sweeps the convolution's GPU geometry: `python benchmarks/gpu_conv.py` prints times, fastest first, and the share of
the copy bandwidth that reading x (and dy) and writing y (or dx) once would take.

Sizes are production3b's: bfloat16, x the first half of a projection, as the model hands it over. Several layers' inputs
take turns, so that the second-level cache holds none of them.
"""

import itertools

from magellano.backend import describe, mx, on_gpu
from magellano.benchmark import machine
from magellano.benchmark.scan import chained
from magellano.errors import InputError
from magellano.ops import launch
from magellano.ops.causal_conv import Geometry, backward, forward

B, T, I, K, LAYERS = 4, 512, 4096, 4, 8
GEOMETRIES = [Geometry(c, s, threads) for c, s, threads in itertools.product((2, 4, 8), (4, 8, 16), (64, 128, 256))]


def main() -> None:
    """Measures both directions with frozen parameters in every geometry."""
    if not on_gpu():
        raise InputError("gpu_conv: MLX's default device is not a GPU")
    copy = machine.copy_bandwidth()
    print(describe(), launch.dialect(), f"copy {copy / 1e9:.0f} GB/s", flush=True)
    mx.random.seed(0)
    joints = [mx.random.normal((B, T, 2 * I)).astype(mx.bfloat16) for _ in range(LAYERS)]
    dys = [mx.random.normal((B, T, I)).astype(mx.bfloat16) for _ in range(LAYERS)]
    weight, bias, reset = mx.random.normal((I, K)), mx.zeros(I), mx.zeros((B, T), dtype=mx.uint8)
    mx.eval(joints, dys, weight, bias, reset)
    for way, arrays in (("forward", 2), ("backward", 3)):
        found = []
        for chosen in GEOMETRIES:
            turn = itertools.cycle(range(LAYERS))

            def run(bias: mx.array, chosen: Geometry = chosen, way: str = way, turn=turn) -> list[mx.array]:  # type: ignore[no-untyped-def]
                layer = next(turn)
                x = mx.split(joints[layer], 2, axis=-1)[0]
                given = {"x": x, "weight": weight, "bias": bias, "reset": reset}
                if way == "forward":
                    return [forward(given, chosen)]
                return [backward(given, dys[layer], True, chosen)["x"]]

            found.append((chained(run, bias, 4 * LAYERS), chosen))
        for seconds, chosen in sorted(found, key=lambda pair: pair[0]):
            share = arrays * B * T * I * 2 / seconds / copy
            print(f"{way} {chosen}: {seconds * 1e6:.1f} us, {share:.0%} of copy", flush=True)


if __name__ == "__main__":
    main()
