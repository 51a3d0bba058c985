"""An adapter that starts from what quantising lost: s B A is the best matrix of its rank for W - Q, Q being the NF4
base (LoftQ: Li et al. 2023, arXiv 2310.08659, Algorithm 1 with one iteration). With more iterations Q would follow the
adapter; so the base stays as it is stored, and adapters go on sharing it.

Large matrices are factored by a randomised SVD with power iterations (Halko, Martinsson & Tropp 2011, arXiv 0909.4061,
Algorithms 4.4 and 5.1). One residual is held at a time, and of an expert stack what its file holds.

Shapes: O out, I in, r rank, k sampled directions.
"""

import math
import zlib
from collections.abc import Callable, Iterator

import numpy as np

from magellano import lora
from magellano.backend import mx
from magellano.layout import ParamSpec, lora_shapes, parameters
from magellano.nf4 import NF4Stack, NF4Tensor
from magellano.profile import LoraConfig, ModelConfig

EXACT = 256  # rows or columns, whichever are fewer, up to which the SVD is LAPACK's
OVERSAMPLED, POWERS = 10, 2

Pieces = Callable[[ParamSpec], Iterator[mx.array]]  # the matrices of a parameter as they were: one, or one per expert
Lost = dict[str, tuple[float, float]]  # by matrix: |W - Q| and |W - Q - s B A|, Frobenius


def start(
    config: ModelConfig, settings: LoraConfig, base: lora.Base, original: Pieces, lost: Lost
) -> dict[str, mx.array]:
    """A and B as `lora.factors` names them; evaluated. Targets that `base` holds dense start as there. `lost` is filled
    on the way.
    """
    tensors = lora.factors(config, settings)
    for spec in parameters(config):
        if lora_shapes(spec, settings) is None:
            continue
        held, path = base(spec), lora.module_path(spec)
        if isinstance(held, mx.array):
            continue
        stacked, matrices = (True, held.tensors) if isinstance(held, NF4Stack) else (False, (held,))
        assert spec.target is not None
        scale = lora.scale(settings, spec.target, spec.layer)
        a, b = (np.array(tensors[f"{path}.{part}"]) for part in ("lora_a", "lora_b"))
        originals = original(spec)
        for e, matrix in enumerate(matrices):
            rng = np.random.default_rng([settings.seed, zlib.crc32(path.encode()), e])
            lost_OI = residual(next(originals), matrix)
            lost[f"{path}/{e}"] = _fill(a[e] if stacked else a, b[e] if stacked else b, lost_OI, scale, rng)
            del lost_OI
        tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"] = mx.array(a), mx.array(b)
        mx.clear_cache()
    mx.eval(tensors)
    return tensors


def residual(w_OI: mx.array, quantized: NF4Tensor) -> np.ndarray:
    """W - Q, float32."""
    found = np.array(w_OI.astype(mx.float32))
    del w_OI
    for first, last, rows in quantized.slices():
        found[first:last] -= np.array(rows)
    return found


def _fill(
    a_rI: np.ndarray, b_Or: np.ndarray, r_OI: np.ndarray, scale: float, rng: np.random.Generator
) -> tuple[float, float]:
    """Put the factors into A and B, and return |R| and |R - s B A|. What a matrix has no rank for stays as it was."""
    whole = float(np.linalg.norm(r_OI))
    if not whole:
        return 0.0, 0.0
    u_Or, s_r, v_rI = factors(r_OI, a_rI.shape[0], rng)
    root = np.sqrt(s_r / scale)
    a_rI[: len(s_r)], b_Or[:, : len(s_r)] = root[:, None] * v_rI, u_Or * root
    kept = float((s_r.astype(np.float64) ** 2).sum())  # of |R|^2, for s B A is a projection of R
    return whole, math.sqrt(max(0.0, whole**2 - kept))


def factors(r_OI: np.ndarray, rank: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """U [O, k], the singular values [k] and V [k, I] of the `rank` largest, k = min(rank, O, I): exact for a matrix
    with few rows or columns, else nearly so.
    """
    O, I = r_OI.shape
    k = min(rank + OVERSAMPLED, O, I)
    if min(O, I) <= EXACT or k == min(O, I):
        u, s, v = np.linalg.svd(r_OI, full_matrices=False)
    else:
        y_Ok = r_OI @ rng.standard_normal((I, k), dtype=np.float32)
        for _ in range(POWERS):
            y_Ok = r_OI @ _levelled(r_OI.T @ _levelled(y_Ok))
        q_Ok = np.linalg.qr(y_Ok)[0]
        u, s, v = np.linalg.svd(q_Ok.T @ r_OI, full_matrices=False)
        u = q_Ok @ u
    return u[:, :rank], s[:rank], v[:rank]


def _levelled(y: np.ndarray) -> np.ndarray:
    """The same space by columns of one length and nearly at right angles: a tenth of a QR's time, and what it lacks in
    exactness the last QR makes good.
    """
    size, v = np.linalg.eigh((y.T @ y).astype(np.float64))
    return y @ (v / np.sqrt(np.maximum(size, size[-1] * 1e-12))).astype(np.float32)
