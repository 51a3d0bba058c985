"""A frozen projection with an adapter on it, y = x W^T + s (x A^T) B^T (LoRA: Hu et al. 2021, arXiv 2106.09685; with W
in 4 bits QLoRA: Dettmers et al. 2023, arXiv 2305.14314). The adapter's part is added inside its product, forward and
backward, so that nothing of y's size is made twice.

DoRA (Liu et al. 2024, arXiv 2402.09353) scales each row of W + s B A to a length m of its own: y times m / |W + s B A|.

Shapes: I in, O out, r rank, M rows.
"""

from collections.abc import Sequence

from magellano.backend import mx
from magellano.ops.lazy import detached
from magellano.ops.nf4 import Quantized, nf4_matmul

_TINY = 1e-30


def adapted_matmul(
    x: mx.array,
    w_OI: mx.array | Quantized,
    a_rI: mx.array,
    b_Or: mx.array,
    scale: float,
    rows: tuple[mx.array, mx.array] | None = None,
    *,
    unread: bool = False,
) -> mx.array:
    """y_..O for x_..I, all in x's dtype; the gradient goes to x, A and B. `rows`: DoRA's m, to which it goes too, and
    |W + s B A|, to which it does not; both [O], float32. `unread`: the caller wants gradients only, so y may be left
    out; m's needs it.
    """
    dtype = x.dtype
    length = () if rows is None else rows[:1]

    @mx.custom_function
    def product(x: mx.array, a_rI: mx.array, b_Or: mx.array, *m: mx.array) -> mx.array:
        count = x.size // x.shape[-1]
        if unread and not m:
            return mx.zeros((*x.shape[:-1], b_Or.shape[0]), dtype)
        x_MI = x.reshape(count, -1)
        y_MO = mx.addmm(_times(x_MI, w_OI), x_MI @ a_rI.T, b_Or.T, alpha=scale)
        return detached(scaled(y_MO, m).reshape(*x.shape[:-1], -1))

    @product.vjp
    def product_vjp(primals, dy, y):  # type: ignore[no-untyped-def]
        x, a_rI, b_Or, *m = primals
        x_MI, dy_MO = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
        dm = [detached(_over((dy_MO.astype(mx.float32) * y.reshape(dy_MO.shape)).sum(axis=0), m[0]))] if m else []
        dz_MO = scaled(dy_MO, m)
        low_Mr, dlow_Mr = scale * (x_MI @ a_rI.T), scale * (dz_MO @ b_Or)
        dx_MI = mx.addmm(_times_transposed(dz_MO, w_OI), dlow_Mr, a_rI)
        dx, da_rI, db_Or = detached(dx_MI.reshape(x.shape)), dlow_Mr.T @ x_MI, dz_MO.T @ low_Mr
        if m:  # else dz would stay as long as they are not made
            da_rI, db_Or = detached(da_rI), detached(db_Or)
        return dx, da_rI, db_Or, *dm

    def scaled(y_MO: mx.array, m: Sequence[mx.array]) -> mx.array:
        if rows is None:
            return y_MO
        return (y_MO.astype(mx.float32) * (m[0] / rows[1])).astype(dtype)

    y: mx.array = product(x, a_rI.astype(dtype), b_Or.astype(dtype), *length)  # type: ignore[assignment]
    return y


def _over(sums_O: mx.array, m_O: mx.array) -> mx.array:
    """The gradient of m in y = m z / norm from sums of dy y; 0 where a row is switched off."""
    return mx.where(m_O == 0, 0.0, sums_O / m_O)


def row_norms(squares_O: mx.array, cross_rO: mx.array, a_rI: mx.array, b_Or: mx.array, scale: float) -> mx.array:
    """|W + s B A| of each row, float32 [.., O], from |W|^2 of each row and A W^T, so that the sum is never made: the
    square is |W|^2 + 2 s B (A W^T) + s^2 B (A A^T) B^T on the diagonal. Without gradient, as DoRA has it (section 4.3).
    Leading axes may be experts.
    """
    a_rI, b_Or = (mx.stop_gradient(x).astype(mx.float32) for x in (a_rI, b_Or))
    cross_Or = mx.stop_gradient(cross_rO).astype(mx.float32).swapaxes(-1, -2)
    more_O = scale * ((2 * cross_Or + scale * (b_Or @ (a_rI @ a_rI.swapaxes(-1, -2)))) * b_Or).sum(axis=-1)
    return mx.stop_gradient(mx.sqrt(mx.maximum(squares_O + more_O, _TINY)))


def _times(x_MI: mx.array, w_OI: mx.array | Quantized) -> mx.array:
    return x_MI @ w_OI.astype(x_MI.dtype).T if isinstance(w_OI, mx.array) else nf4_matmul(x_MI, w_OI)


def _times_transposed(dy_MO: mx.array, w_OI: mx.array | Quantized) -> mx.array:
    if isinstance(w_OI, mx.array):
        return dy_MO @ w_OI.astype(dy_MO.dtype)
    return detached(dy_MO @ w_OI.dequantize(dy_MO.dtype, after=dy_MO))
