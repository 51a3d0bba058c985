"""Add an operation: contract, reference, kernel, gradient, and the check against something that was not written here.

    python examples/add_operation.py

The operation is y = max(x, 0)^2 (squared ReLU: So et al. 2021, arXiv 2109.08668). In the project its kernel's text
would be kernels/squared_relu.metal, its code magellano/ops/squared_relu.py and its check tests/ops/test_squared_relu.py
(CONTRIBUTING.md, "Add an operation").
"""

import time

import numpy as np

from magellano.backend import mx
from magellano.ops.launch import Kernel, gpu_geometry
from magellano.ops.lazy import plain

SIZES = ((70_001, mx.float32, 1e-6), (1, mx.float32, 1e-6), (0, mx.float32, 0.0), (999, mx.bfloat16, 1e-2))
THREADS, HOST_ELEMENTS = 256, 1 << 16  # of a threadgroup on a GPU; elements of one host thread


class _Text(Kernel):
    """One text for Metal, CUDA and host C++: LD and ST convert to and from float, LANES is where a host vectorises."""

    body = """
  const size_t n = x_shape[0], begin = (size_t)thread_position_in_grid.x * CPT;
  const size_t end = begin + CPT < n ? begin + CPT : n;
  LANES for (size_t i = begin; i < end; ++i) {
    const float positive = LD(x, i) > 0.0f ? LD(x, i) : 0.0f;
    ST(T, y, i, positive * positive);
  }
"""


_SQUARED_RELU = _Text("squared_relu_example", ("x",), ("y",))


def reference(x: mx.array) -> mx.array:
    """The definition, in plain MLX: what the kernel is tested against, and what serves where no kernel can."""
    positive = mx.maximum(x.astype(mx.float32), 0.0)
    return (positive * positive).astype(x.dtype)


def _kernel(x: mx.array) -> mx.array:
    threads = THREADS if gpu_geometry() else 1
    y: mx.array = _SQUARED_RELU(
        [x.reshape(-1)],
        template={"T": x.dtype, "CPT": 1},
        grid=(-(-x.size // threads) * threads, 1, 1),
        threadgroup=(threads, 1, 1),
        host_template={"CPT": HOST_ELEMENTS},
        host_grid=(-(-x.size // HOST_ELEMENTS), 1, 1),
        output_shapes=[(x.size,)],
        output_dtypes=[x.dtype],
    )[0]
    return y.reshape(x.shape)


def squared_relu(x: mx.array) -> mx.array:
    """max(x, 0)^2 of any shape, in x's dtype, float32 inside; the gradient is 2 max(x, 0) dy."""

    @mx.custom_function
    def run(x: mx.array) -> mx.array:
        return reference(x) if not x.size or plain(x) else _kernel(x)

    @run.vjp
    def run_vjp(x, dy, _):  # type: ignore[no-untyped-def]
        return 2.0 * mx.maximum(x, 0.0) * dy

    return run(x)


def check() -> None:
    """Output and gradient against float64: an odd size, one element, none, and 16 bits."""
    rng = np.random.default_rng(0)
    for size, dtype, tolerance in SIZES:
        x = mx.array(rng.normal(size=size), dtype=mx.float32).astype(dtype)
        dy = mx.array(rng.normal(size=size), dtype=mx.float32).astype(dtype)
        exact, weight = (np.array(a.astype(mx.float32)).astype(np.float64) for a in (x, dy))
        y, (dx,) = squared_relu(x), mx.vjp(squared_relu, [x], [dy])[1]
        np.testing.assert_allclose(np.array(y.astype(mx.float32)), np.maximum(exact, 0) ** 2, rtol=tolerance)
        wanted = 2 * np.maximum(exact, 0) * weight
        np.testing.assert_allclose(np.array(dx.astype(mx.float32)), wanted, rtol=2 * tolerance)
        print(f"{size:6} elements of {dtype}: output and gradient as in float64")


def seconds(operation, x: mx.array) -> float:  # type: ignore[no-untyped-def]
    """The fastest of a few calls."""
    found = []
    for _ in range(5):
        start = time.perf_counter()
        mx.eval(operation(x))
        found.append(time.perf_counter() - start)
    return min(found)


check()
x = mx.random.normal((1 << 22,))
mx.eval(x)
print(f"4 M elements: {seconds(reference, x) / seconds(squared_relu, x):.1f}x as fast as the reference")
