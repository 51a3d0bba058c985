"""A frozen projection with an adapter on it, y = x W^T + s (x A^T) B^T (LoRA: Hu et al. 2021, arXiv 2106.09685; with W
in 4 bits QLoRA: Dettmers et al. 2023, arXiv 2305.14314). The adapter's part is added inside its product, forward and
backward, so that nothing of y's size is made twice.

Shapes: I in, O out, r rank, M rows.
"""

from magellano.backend import mx
from magellano.ops.lazy import detached
from magellano.ops.nf4 import Quantized, nf4_matmul


def adapted_matmul(
    x: mx.array, w_OI: mx.array | Quantized, a_rI: mx.array, b_Or: mx.array, scale: float, *, unread: bool = False
) -> mx.array:
    """y_..O for x_..I, all in x's dtype; the gradient goes to x, A and B. `unread`: the caller wants gradients only, so
    y may be left out.
    """
    dtype = x.dtype

    @mx.custom_function
    def product(x: mx.array, a_rI: mx.array, b_Or: mx.array) -> mx.array:
        rows = x.size // x.shape[-1]
        if unread:
            return mx.zeros((*x.shape[:-1], b_Or.shape[0]), dtype)
        x_MI = x.reshape(rows, -1)
        y_MO = mx.addmm(_times(x_MI, w_OI), x_MI @ a_rI.T, b_Or.T, alpha=scale)
        return detached(y_MO.reshape(*x.shape[:-1], -1))

    @product.vjp
    def product_vjp(primals, dy, _):  # type: ignore[no-untyped-def]
        x, a_rI, b_Or = primals
        x_MI, dy_MO = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        low_Mr, dlow_Mr = scale * (x_MI @ a_rI.T), scale * (dy_MO @ b_Or)
        dx_MI = mx.addmm(_times_transposed(dy_MO, w_OI), dlow_Mr, a_rI)
        return detached(dx_MI.reshape(x.shape)), dlow_Mr.T @ x_MI, dy_MO.T @ low_Mr

    y: mx.array = product(x, a_rI.astype(dtype), b_Or.astype(dtype))  # type: ignore[assignment]
    return y


def _times(x_MI: mx.array, w_OI: mx.array | Quantized) -> mx.array:
    return x_MI @ w_OI.astype(x_MI.dtype).T if isinstance(w_OI, mx.array) else nf4_matmul(x_MI, w_OI)


def _times_transposed(dy_MO: mx.array, w_OI: mx.array | Quantized) -> mx.array:
    if isinstance(w_OI, mx.array):
        return dy_MO @ w_OI.astype(dy_MO.dtype)
    return detached(dy_MO @ w_OI.dequantize(dy_MO.dtype, after=dy_MO))
