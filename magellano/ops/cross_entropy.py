"""Linear + cross-entropy over a large vocabulary without ever holding all logits: they exist for `chunk` rows at a
time.

The forward pass computes the loss and, while a chunk's logits are there, every gradient; the backward pass only scales
them by the cotangent. The other choice, to make the logits again in the backward pass, would add a third product to
three, and the gradients kept meanwhile are no larger than their inputs. The price: a loss without gradients costs as
much; use `token_scores`.

The vocabulary is walked in slices. On a CPU, and where w trains, they bound memory: an NF4 head is never dense as a
whole, and the gradient of w comes in parts. On a GPU they are two: the columns that make a multiple of 64, and the
rest. 50,257 columns at once run at 98 TFLOP/s on an H200 where 50,176 run at 460 (512 rows) to 680 (2,048 rows).

With `renyi` the loss is nll - beta H_alpha(softmax), H_alpha = log(sum p^alpha) / (1 - alpha) (Renyi 1961), the
confidence penalty of Pereyra et al. 2017 (arXiv 1701.06548) with Renyi's entropy in place of Shannon's, to which it
tends as alpha tends to 1. Near 1 nothing cancels: with a = alpha - 1, sum p^alpha = 1 + a sum (p^alpha - p) / a, and
the gradient in a logit is beta alpha p (exp(a (log p + H)) - 1) / a, both by a series where a log p is small.

Shapes: M rows, D d_model, V vocabulary, r LoRA rank, C rows of a chunk, W columns of a slice.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from magellano.backend import mx, on_gpu
from magellano.ops.host import KERNELS
from magellano.ops.launch import Kernel
from magellano.ops.lazy import detached, plain, settle
from magellano.ops.nf4 import Quantized

_SLICE_WEIGHTS = 1 << 24  # of w, in one slice of the vocabulary
_SIMDGROUPS = 8  # that share a row on a GPU
_THREADS = 32 * _SIMDGROUPS
_COLUMNS = 1024  # of one thread on the host
_DIRECT = 0.25  # how far from 1 the order is where p^order is summed as it is
_HEADER = (KERNELS / "cross_entropy.h").read_text(encoding="utf-8")
_STATISTICS = Kernel("cross_entropy_statistics", ("logits", "target", "lse_before", "picked_before"), ("lse", "picked"))
_ENTROPY = Kernel("cross_entropy_entropy", ("logits", "lse", "before", "numbers"), ("sum",), header=_HEADER)
_GRADIENT = Kernel(
    "cross_entropy_gradient", ("logits", "lse", "entropy", "target", "weight", "numbers"), ("g",), header=_HEADER
)


@dataclass(frozen=True)
class Renyi:
    """The loss's entropy term: beta times the Renyi entropy of order alpha is taken off; 0 < alpha <= 4."""

    alpha: float
    beta: float

    def __post_init__(self) -> None:
        assert 0 < self.alpha <= 4, f"Renyi entropy of order {self.alpha}: must be in (0, 4]"

    @property
    def direct(self) -> bool:
        return abs(self.alpha - 1.0) >= _DIRECT

    def entropy(self, sum_C: mx.array) -> mx.array:
        """H_alpha of each row in nats, from the sum of p^alpha, or near order 1 that of (p^alpha - p) / (alpha - 1)."""
        a = self.alpha - 1.0
        if self.direct:
            return mx.log(sum_C) / -a
        return -mx.log1p(a * sum_C) / a if a else -sum_C


@functools.cache
def _numbers(renyi: Renyi | None) -> mx.array:
    """a = alpha - 1, and the gradient's factor beta alpha."""
    values = (renyi.alpha - 1.0, renyi.beta * renyi.alpha) if renyi else (0.0, 0.0)
    return mx.array(np.array([*values, *[0.0] * 6], np.float32))


@dataclass(frozen=True)
class _Head:
    """logits = x w^T (+ u b^T), for the vocabulary's slices."""

    w_VD: mx.array | Quantized
    b_Vr: mx.array | None
    narrow: bool  # bound the slices' width on a GPU too

    @property
    def size(self) -> int:
        return self.w_VD.shape[0]

    def slices(self, dtype: mx.Dtype) -> Iterator[tuple[int, int, mx.array]]:
        """(first class, last class + 1, w_WD) in `dtype`."""
        if not isinstance(self.w_VD, mx.array):
            yield from self.w_VD.slices(dtype)
            return
        step = max(64, _SLICE_WEIGHTS // self.w_VD.shape[1] // 64 * 64)
        if on_gpu() and not self.narrow:
            step = max(64, self.size // 64 * 64)
        for first in range(0, self.size, step):
            yield first, min(first + step, self.size), self.w_VD[first : first + step].astype(dtype)

    def logits(self, x_CD: mx.array, u_Cr: mx.array | None) -> list[mx.array]:
        """[C, W] for each slice, in x's dtype."""
        parts = []
        for first, last, w_WD in self.slices(x_CD.dtype):
            logits_CW = x_CD @ w_WD.T
            if u_Cr is not None and self.b_Vr is not None:
                logits_CW = mx.addmm(logits_CW, u_Cr.astype(x_CD.dtype), self.b_Vr[first:last].astype(x_CD.dtype).T)
            parts.append(detached(logits_CW))
            del w_WD, logits_CW  # before the next slice is made dense
        return parts


def _statistics(
    logits_CW: mx.array, local_C: mx.array, before: tuple[mx.array, mx.array] | None
) -> tuple[mx.array, mx.array]:
    """log sum exp of the logits so far, and the target's logit, 0 if its slice is still to come; float32 [C]. `before`:
    those of the slices before this one.
    """
    rows, width = logits_CW.shape
    if not plain(logits_CW, local_C):
        lse_C, picked_C = _STATISTICS(
            [logits_CW, local_C, *(before or _nothing())],
            template={"SG": _SIMDGROUPS, "FIRST": before is None},
            grid=(_THREADS, rows, 1),
            threadgroup=(_THREADS, 1, 1),
            host_template={"SG": 1},
            host_grid=(1, rows, 1),
            output_shapes=[(rows,), (rows,)],
            output_dtypes=[mx.float32, mx.float32],
        )
        return lse_C, picked_C
    logits_CW = logits_CW.astype(mx.float32)
    lse_C = mx.logsumexp(logits_CW, axis=1)
    picked_C = mx.take_along_axis(logits_CW, mx.clip(local_C, 0, width - 1)[:, None], axis=1)[:, 0]
    picked_C = mx.where((local_C >= 0) & (local_C < width), picked_C, 0.0)
    return (lse_C, picked_C) if before is None else (mx.logaddexp(before[0], lse_C), before[1] + picked_C)


@functools.cache
def _nothing() -> tuple[mx.array, mx.array]:
    return mx.zeros((8,)), mx.zeros((8,))


def _tilt(log_p: mx.array, y: mx.array, a: float) -> mx.array:
    """As k_tilt in kernels/cross_entropy.h."""
    if not a:
        return mx.exp(log_p) * y
    near, far = mx.exp(log_p) * mx.expm1(a * y), mx.exp(log_p + a * y) - mx.exp(log_p)
    return mx.where(mx.abs(a * y) < 0.5, near, far) / a


def _entropy(parts: list[mx.array], lse_C: mx.array, renyi: Renyi) -> mx.array:
    """The Renyi entropy of each row's softmax, float32 [C]."""
    sum_C = None
    for logits_CW in parts:
        rows = logits_CW.shape[0]
        if not plain(logits_CW, lse_C):
            sum_C = _ENTROPY(
                [logits_CW, lse_C, _nothing()[0] if sum_C is None else sum_C, _numbers(renyi)],
                template={"SG": _SIMDGROUPS, "FIRST": sum_C is None, "DIRECT": renyi.direct},
                grid=(_THREADS, rows, 1),
                threadgroup=(_THREADS, 1, 1),
                host_template={"SG": 1},
                host_grid=(1, rows, 1),
                output_shapes=[(rows,)],
                output_dtypes=[mx.float32],
            )[0]
            continue
        log_p = logits_CW.astype(mx.float32) - lse_C[:, None]
        terms = mx.exp(renyi.alpha * log_p) if renyi.direct else _tilt(log_p, log_p, renyi.alpha - 1.0)
        sum_C = terms.sum(axis=1) + (0.0 if sum_C is None else sum_C)
    assert sum_C is not None
    return renyi.entropy(sum_C)


def _gradient(
    logits_CW: mx.array, lse_C: mx.array, entropy_C: mx.array | None, local_C: mx.array, rows: "_Rows"
) -> mx.array:
    """The loss's gradient in the logits, exactly 0 where the weight is 0; [C, W] in x's dtype."""
    count, width = logits_CW.shape
    dtype, weight_C, renyi = rows.x_CD.dtype, rows.weight_C, rows.renyi
    if not plain(logits_CW, lse_C, local_C, weight_C):
        entropies = _nothing()[0] if entropy_C is None else entropy_C
        return _GRADIENT(
            [logits_CW, lse_C, entropies, local_C, weight_C, _numbers(renyi)],
            template={"T": dtype, "CPT": 1, "ENTROPY": renyi is not None},
            grid=(-(-width // _THREADS) * _THREADS, count, 1),
            threadgroup=(_THREADS, 1, 1),
            host_template={"CPT": _COLUMNS},
            host_grid=(-(-width // _COLUMNS), count, 1),
            output_shapes=[logits_CW.shape],
            output_dtypes=[dtype],
        )[0]
    log_p = logits_CW.astype(mx.float32) - lse_C[:, None]
    g_CW = mx.exp(log_p) - (mx.arange(width, dtype=mx.int32) == local_C[:, None])
    if renyi is not None and entropy_C is not None:
        a = renyi.alpha - 1.0
        g_CW = g_CW + renyi.beta * renyi.alpha * _tilt(log_p, log_p + entropy_C[:, None], a)
    return mx.where(weight_C[:, None] == 0, 0.0, g_CW * weight_C[:, None]).astype(dtype)


def _nll(parts: list[mx.array], target_C: mx.array) -> tuple[mx.array, mx.array]:
    """log sum exp over all slices and the target's logit."""
    first, found = 0, None
    for logits_CW in parts:
        found = _statistics(logits_CW, target_C - first, found)
        first += logits_CW.shape[1]
    assert found is not None
    return found


def _prepare(x_MD, w_VD, target_M, weight_M):  # type: ignore[no-untyped-def]
    assert x_MD.ndim == 2, f"x must be [M, D], got {x_MD.shape}"
    assert target_M.shape == weight_M.shape == x_MD.shape[:1], (x_MD.shape, target_M.shape, weight_M.shape)
    assert w_VD.shape[1] == x_MD.shape[1], f"x {x_MD.shape} does not fit w {w_VD.shape}"
    if not isinstance(w_VD, mx.array) and on_gpu():
        w_VD = w_VD.dequantize(x_MD.dtype)  # small beside the rest there, and making it for each chunk is not
    weight_M = weight_M.astype(mx.float32)
    return w_VD, mx.where(weight_M == 0, 0, target_M).astype(mx.int32), weight_M


def linear_cross_entropy(
    x_MD: mx.array,
    w_VD: mx.array | Quantized,
    target_M: mx.array,
    weight_M: mx.array,
    u_Mr: mx.array | None = None,
    b_Vr: mx.array | None = None,
    chunk: int = 512,
    *,
    frozen: bool = False,
    renyi: Renyi | None = None,
) -> mx.array:
    """sum_m weight[m] * -log softmax(x w^T + u b^T)[m, target[m]] in nats, a float32 scalar; with `renyi`, less beta
    times the entropy of that softmax.

    Differentiable in x, u, b and a dense w, not in weight. Rows of weight 0 count exactly nothing, whatever their
    target. `frozen` says that a dense w needs no gradient: saves its product and its memory. NF4 w is always frozen.
    """
    return objective_and_nll(x_MD, w_VD, target_M, weight_M, u_Mr, b_Vr, chunk, frozen=frozen, renyi=renyi)[0]


def objective_and_nll(
    x_MD: mx.array,
    w_VD: mx.array | Quantized,
    target_M: mx.array,
    weight_M: mx.array,
    u_Mr: mx.array | None = None,
    b_Vr: mx.array | None = None,
    chunk: int = 512,
    *,
    frozen: bool = False,
    renyi: Renyi | None = None,
) -> tuple[mx.array, mx.array]:
    """What `linear_cross_entropy` returns, and the same without the entropy term: it costs no further pass and has no
    gradient.
    """
    trains_w = isinstance(w_VD, mx.array) and not frozen
    w_VD, target_M, weight_M = _prepare(x_MD, w_VD, target_M, weight_M)
    given = {"x": x_MD, "w": w_VD if trains_w else None, "u": u_Mr, "b": b_Vr}
    names = [name for name, value in given.items() if value is not None]

    @mx.custom_function
    def loss(*arrays: mx.array) -> tuple[mx.array, ...]:
        named = dict(zip(names, arrays, strict=True))
        head = _Head(named.get("w", w_VD), named.get("b"), trains_w)
        rows = _Rows(named["x"], named.get("u"), target_M, weight_M, renyi)
        sums, gradients = _loss_and_gradients(rows, head, chunk, trains_w)
        return *sums, *(gradients[name] for name in names)

    @loss.vjp
    def loss_vjp(primals, cotangents, outputs):  # type: ignore[no-untyped-def]
        arrays = primals if len(names) > 1 else [primals]
        gradients = outputs[-len(names) :]
        scaled = [(cotangents[0] * g).astype(a.dtype) for g, a in zip(gradients, arrays, strict=True)]
        return scaled if len(names) > 1 else scaled[0]

    outputs: tuple[mx.array, ...] = loss(*(given[name] for name in names))  # type: ignore[assignment]
    return outputs[0], mx.stop_gradient(outputs[0 if renyi is None else 1])


@dataclass
class _Rows:
    """Rows: what the loss needs of them."""

    x_CD: mx.array
    u_Cr: mx.array | None
    target_C: mx.array
    weight_C: mx.array
    renyi: Renyi | None


def _loss_and_gradients(
    rows: _Rows, head: _Head, chunk: int, trains_w: bool
) -> tuple[list[mx.array], dict[str, mx.array]]:
    """The loss of all rows, with an entropy term also without it, and its gradients in float32, by name: x, w (if it
    trains), u and b (if there).
    """
    losses, dx, du, done = [], [], [], mx.zeros(())
    sums: dict[str, dict[int, mx.array]] = {"w": {}, "b": {}}  # by the slice's first class
    for i in range(0, rows.x_CD.shape[0], chunk):
        at = slice(i, i + chunk)
        x_CD = mx.depends([rows.x_CD[at]], [done])[0]  # one chunk after the other, also in a lazy graph
        u_Cr = None if rows.u_Cr is None else rows.u_Cr[at]
        part = _Rows(x_CD, u_Cr, rows.target_C[at], rows.weight_C[at], rows.renyi)
        loss, dx_CD, du_Cr = _chunk(part, head, sums, trains_w)
        losses.append(loss)
        dx.append(dx_CD)
        du.append(du_Cr)
        done = dx_CD
    gradients = {"x": mx.concatenate(dx)}
    if rows.u_Cr is not None:
        gradients["u"] = mx.concatenate(du)
    gradients |= {name: mx.concatenate(list(parts.values())) for name, parts in sums.items() if parts}
    return [mx.stack(list(of_chunks)).sum() for of_chunks in zip(*losses, strict=True)], gradients


def _chunk(
    rows: _Rows, head: _Head, sums: dict[str, dict[int, mx.array]], trains_w: bool
) -> tuple[list[mx.array], mx.array, mx.array]:
    """The loss of a chunk, with an entropy term also without it; dx and du (0 without u); adds its share of dw and db
    to `sums`.
    """
    x_CD, u_Cr, b_Vr = rows.x_CD, rows.u_Cr, head.b_Vr
    parts = head.logits(x_CD, u_Cr)
    lse_C, picked_C = _nll(parts, rows.target_C)
    losses, entropy_C = [lse_C - picked_C], None
    if rows.renyi is not None:
        entropy_C = _entropy(parts, lse_C, rows.renyi)
        losses.insert(0, losses[0] - rows.renyi.beta * entropy_C)
    sums_of = [detached(mx.where(rows.weight_C == 0, 0.0, rows.weight_C * loss_C).sum()) for loss_C in losses]
    dx_CD, du_Cr = mx.zeros(x_CD.shape), mx.zeros(())
    for first, last, w_WD in head.slices(x_CD.dtype):
        g_CW = _gradient(parts.pop(0), lse_C, entropy_C, rows.target_C - first, rows)
        dx_CD = detached(dx_CD + (g_CW @ w_WD).astype(mx.float32))
        if trains_w:
            _add(sums["w"], first, g_CW.T @ x_CD)
        if u_Cr is not None and b_Vr is not None:
            du_Cr = detached(du_Cr + (g_CW @ b_Vr[first:last].astype(g_CW.dtype)).astype(mx.float32))
            _add(sums["b"], first, g_CW.T @ u_Cr.astype(g_CW.dtype))
        del w_WD, g_CW  # before the next slice is made dense
    return sums_of, dx_CD, du_Cr


def _add(parts: dict[int, mx.array], first: int, more: mx.array) -> None:
    more = more.astype(mx.float32)
    parts[first] = detached(parts[first] + more if first in parts else more)


def token_scores(
    x_MD: mx.array,
    w_VD: mx.array | Quantized,
    target_M: mx.array,
    weight_M: mx.array,
    u_Mr: mx.array | None = None,
    b_Vr: mx.array | None = None,
    chunk: int = 512,
) -> tuple[mx.array, mx.array]:
    """-log softmax(x w^T + u b^T)[m, target[m]] in nats, float32 [M]; whether no other class scored as high, bool [M].

    No gradient. Rows of weight 0 give 0 and False; other weights change nothing.
    """
    w_VD, target_M, weight_M = _prepare(x_MD, w_VD, target_M, weight_M)
    head = _Head(w_VD, b_Vr, narrow=False)
    nll: list[mx.array] = []
    correct: list[mx.array] = []
    for i in range(0, x_MD.shape[0], chunk):
        at = slice(i, i + chunk)
        parts = head.logits(
            mx.depends([x_MD[at]], nll[-1:])[0] if nll else x_MD[at], None if u_Mr is None else u_Mr[at]
        )
        lse_C, picked_C = _nll(parts, target_M[at])
        as_high_C = mx.stack([(part >= picked_C[:, None]).sum(axis=1) for part in parts]).sum(axis=0)
        nll.append(mx.where(weight_M[at] == 0, 0.0, lse_C - picked_C))
        correct.append((as_high_C == 1) & (weight_M[at] != 0))
        settle(nll[-1], correct[-1])
    return mx.stop_gradient(mx.concatenate(nll)), mx.concatenate(correct)
