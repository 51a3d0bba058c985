"""Mixture of experts: top-k routing, and the matrix product whose rows each belong to one expert.

Shapes: M tokens, E experts, k experts per token, S = M*k token copies sorted by expert, D in, F out.
"""

from collections.abc import Sequence

from magellano.backend import mx
from magellano.ops.lazy import detached
from magellano.ops.nf4 import Quantized


def route(logits_ME: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """The k likeliest experts of each token, likeliest first: (gate float32 [M, k] that sum to 1, expert int32 [M,
    k]).

    softmax over all experts, renormalised over the chosen: the same as softmax over the chosen ones' logits. Equal
    logits: the lower expert. Differentiable in the gates.
    """
    assert 1 <= k <= logits_ME.shape[-1], f"{k} of {logits_ME.shape[-1]} experts"
    logits_ME = logits_ME.astype(mx.float32)
    expert_Mk = mx.stop_gradient(mx.argsort(-logits_ME, axis=-1)[:, :k])
    gate_Mk = mx.softmax(mx.take_along_axis(logits_ME, expert_Mk, axis=-1), axis=-1)
    return gate_Mk, expert_Mk.astype(mx.int32)


def grouped_matmul(x_SD: mx.array, w_EFD: mx.array | Sequence[Quantized], sizes: list[int]) -> mx.array:
    """y_SF: the first sizes[0] rows of x times w[0]^T, the next sizes[1] rows times w[1]^T, and so on; sizes may be 0.

    Differentiable in x and a dense w. NF4 experts are frozen, made dense one at a time, and again in the backward
    pass.
    """
    assert sum(sizes) == x_SD.shape[0], f"sizes {sizes} do not sum to the {x_SD.shape[0]} rows"
    assert len(sizes) == len(w_EFD), f"{len(sizes)} sizes for {len(w_EFD)} experts"
    return _dense(x_SD, w_EFD, sizes) if isinstance(w_EFD, mx.array) else _quantized(x_SD, w_EFD, sizes)


def _groups(sizes: list[int]) -> list[tuple[int, slice]]:
    """(expert, its rows) for every expert that has rows."""
    groups, first = [], 0
    for e, size in enumerate(sizes):
        if size:
            groups.append((e, slice(first, first + size)))
        first += size
    return groups


def _join(parts: list[mx.array], width: int, dtype: mx.Dtype) -> mx.array:
    return mx.concatenate(parts) if parts else mx.zeros((0, width), dtype)


def _dense(x_SD: mx.array, w_EFD: mx.array, sizes: list[int]) -> mx.array:
    groups, (_, F, D) = _groups(sizes), w_EFD.shape

    # MLX's own gradient of w[e] is a zero tensor of w's whole size for each expert; ours is one stack.
    @mx.custom_function
    def product(x_SD: mx.array, w_EFD: mx.array) -> mx.array:
        return _join([x_SD[rows] @ w_EFD[e].T for e, rows in groups], F, x_SD.dtype)

    @product.vjp
    def product_vjp(primals, dy_SF, _):  # type: ignore[no-untyped-def]
        x_SD, w_EFD = primals
        dx_SD = _join([dy_SF[rows] @ w_EFD[e] for e, rows in groups], D, x_SD.dtype)
        dw = {e: dy_SF[rows].T @ x_SD[rows] for e, rows in groups}
        return dx_SD, mx.stack([dw[e] if e in dw else mx.zeros((F, D), w_EFD.dtype) for e in range(len(sizes))])

    y_SF: mx.array = product(x_SD, w_EFD)  # type: ignore[assignment]
    return y_SF


def _quantized(x_SD: mx.array, w_EFD: Sequence[Quantized], sizes: list[int]) -> mx.array:
    groups, (F, D) = _groups(sizes), w_EFD[0].shape

    def one_by_one(a_SK: mx.array, transpose: bool) -> list[mx.array]:
        """Each group's rows times its expert's weights; an expert is made dense only when the one before is done."""
        parts: list[mx.array] = []
        for e, rows in groups:
            w_FD = w_EFD[e].dequantize(a_SK.dtype, after=parts[-1] if parts else a_SK)
            parts.append(detached(a_SK[rows] @ (w_FD.T if transpose else w_FD)))
        return parts

    @mx.custom_function
    def product(x_SD: mx.array) -> mx.array:
        return _join(one_by_one(x_SD, transpose=True), F, x_SD.dtype)

    @product.vjp
    def product_vjp(x_SD: mx.array, dy_SF: mx.array, _: mx.array) -> mx.array:
        return _join(one_by_one(dy_SF, transpose=False), D, dy_SF.dtype)

    y_SF: mx.array = product(x_SD)  # type: ignore[assignment]
    return y_SF
