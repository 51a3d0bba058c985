"""NF4 of a matrix for the inputs that it meets: each column's rounding error is made up for by the columns that are
still to be rounded (GPTQ: Frantar et al. 2022, arXiv 2210.17323; the order of columns by their weight as there).

An adapter's change is often smaller than half a step of the base's grid: rounded to nearest, it is gone. With the error
carried on, a sum over many inputs keeps it.

Shapes: O out, I in; n rows of inputs.
"""

import numpy as np

from magellano import nf4
from magellano.backend import mx
from magellano.nf4 import NF4Tensor
from magellano.ops.nf4 import BLOCK, midpoints, values

DAMPING = 0.01  # of the mean second moment, added to each: inputs that were never seen count a little
_COLUMNS = 128  # rounded before the rest of the matrix is told
_TINY = 1e-38


def moment(x_nI: mx.array) -> np.ndarray:
    """The inputs' second moment x^T x, float64 [I, I]."""
    x = np.array(x_nI.astype(mx.float32), dtype=np.float64)
    return x.T @ x


def requantized(w_OI: mx.array, moment_II: np.ndarray, base: NF4Tensor | None = None) -> tuple[NF4Tensor, float, float]:
    """NF4 of `w_OI`, and the squared error of its products with inputs of that second moment, as shares of the
    products' own squares: of what is returned, and of rounding to nearest. Of three the one with the smallest error:
    carried on with new factors; carried on with those of `base`, on whose grid the base itself lies; to nearest.
    """
    nearest = nf4.quantize(w_OI)
    w = np.array(w_OI.astype(mx.float32), dtype=np.float64)
    whole = _weighted(w, moment_II)
    if not whole > 0:
        return nearest, 0.0, 0.0
    order, carry = _carry(moment_II)
    made = [nearest]
    for grid in (nearest, *([] if base is None else [base])):
        factor_OI = np.repeat(np.array(grid.factors(), dtype=np.float64), BLOCK)[: w.size].reshape(w.shape)
        code_OI = _codes(w, np.maximum(factor_OI, _TINY), order, carry)
        made.append(NF4Tensor.from_arrays(nearest.shape, grid.arrays() | {"codes": _packed(code_OI)}))
    errors = [_weighted(w - np.array(tensor.dequantize(mx.float32)), moment_II) / whole for tensor in made]
    best = int(np.argmin(errors))
    return made[best], errors[best], errors[0]


def _weighted(e_OI: np.ndarray, moment_II: np.ndarray) -> float:
    return float(np.einsum("oi,oi->", e_OI @ moment_II, e_OI))


def _carry(moment_II: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order of the columns, heaviest first, and a triangle whose row j says what the error of column j asks of the
    later ones.
    """
    order = np.argsort(-np.diag(moment_II), kind="stable")
    h = moment_II[np.ix_(order, order)]
    h = h + DAMPING * np.diag(h).mean() * np.eye(len(h))
    return order, np.linalg.cholesky(np.linalg.inv(h)).T


def _codes(w_OI: np.ndarray, factor_OI: np.ndarray, order: np.ndarray, carry: np.ndarray) -> np.ndarray:
    """The codes, uint8 [O, I], for blocks of these factors."""
    w, factor = w_OI[:, order], factor_OI[:, order]
    borders, table = np.array(midpoints(), dtype=np.float64), np.array(values(), dtype=np.float64)
    code = np.empty(w.shape, dtype=np.uint8)
    for start in range(0, w.shape[1], _COLUMNS):
        stop = min(start + _COLUMNS, w.shape[1])
        errors = np.empty((w.shape[0], stop - start))
        for j in range(start, stop):
            code[:, j] = np.searchsorted(borders, w[:, j] / factor[:, j])
            error = (w[:, j] - table[code[:, j]] * factor[:, j]) / carry[j, j]
            w[:, j + 1 : stop] -= np.outer(error, carry[j, j + 1 : stop])
            errors[:, j - start] = error
        w[:, stop:] -= errors @ carry[start:stop, stop:]
    back = np.empty_like(code)
    back[:, order] = code
    return back


def _packed(code_OI: np.ndarray) -> mx.array:
    """Two codes a byte, the first in the higher half."""
    flat = np.append(code_OI.reshape(-1), np.zeros(code_OI.size % 2, dtype=np.uint8))
    return mx.array(flat[0::2] * 16 + flat[1::2])
