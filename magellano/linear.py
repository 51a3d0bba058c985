"""Projections that may be dense or NF4, with or without an adapter: y = x W^T + s (x A^T) B^T, and DoRA's scaling.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314): W is frozen in 4 bits and dequantised on the fly, only A and B train
(Hu et al. 2021, arXiv 2106.09685). Dense W trains in full.

Shapes: I in, O out, r rank, E experts, M rows, V vocabulary, D d_model.
"""

from magellano.backend import mx, nn
from magellano.layout import SMALL_WEIGHT
from magellano.nf4 import NF4Stack, NF4Tensor
from magellano.ops import lora as ops_lora
from magellano.ops import nf4_matmul
from magellano.ops.add_rows import add_rows
from magellano.ops.expert_layer import Layer
from magellano.ops.launch import gpu_geometry
from magellano.ops.lora import adapted_matmul

Weight = mx.array | NF4Tensor | NF4Stack


def array(weight: Weight) -> mx.array:
    """A weight that is never quantised: norms, biases, convolutions, A_log, D, routers."""
    assert isinstance(weight, mx.array)
    return weight


def matmul(x: mx.array, weight: Weight) -> mx.array:
    """x_..I W_OI^T in x's dtype, W dense or NF4."""
    if isinstance(weight, mx.array):
        return x @ weight.astype(x.dtype).T
    assert isinstance(weight, NF4Tensor)
    return nf4_matmul(x, weight)


def squares(weight: Weight) -> mx.array:
    """|W|^2 of each row, float32 [.., O]; computed now, never dense as a whole."""
    if isinstance(weight, NF4Stack):
        return mx.stack([squares(matrix) for matrix in weight.tensors])
    if isinstance(weight, mx.array):
        found = weight.astype(mx.float32).square().sum(axis=-1)
    else:
        parts = []
        for _, _, rows in weight.slices():
            parts.append(rows.square().sum(axis=-1))
            mx.eval(parts[-1])
        found = mx.concatenate(parts)
    mx.eval(found)
    return found


def row_norms(weight: Weight, squares_O: mx.array, a: mx.array, b: mx.array, scale: float) -> mx.array:
    """|W + s B A| of each row, float32 [.., O]; computed now."""
    if a.ndim == 3:
        assert not isinstance(weight, NF4Tensor)
        return mx.stack([row_norms(weight[e], squares_O[e], a[e], b[e], scale) for e in range(a.shape[0])])
    norms = ops_lora.row_norms(squares_O, matmul(a.astype(mx.float32), weight), a, b, scale)
    mx.eval(norms)
    return norms


def merged(w: mx.array, a: mx.array, b: mx.array, scale: float, m: mx.array | None = None) -> mx.array:
    """W + s B A in float32 for a dense W [.., O, I], with `m` its rows scaled to these lengths."""
    w = w + scale * (b.astype(mx.float32) @ a.astype(mx.float32))
    if m is None:
        return w
    return w * (m.reshape(*w.shape[:-1], 1) / mx.maximum(mx.linalg.norm(w, axis=-1, keepdims=True), 1e-15))


class Adapted(nn.Module):
    """What all projections share: a weight (array or NF4) and room for one adapter."""

    def __init__(self, weight: Weight):
        super().__init__()
        if isinstance(weight, mx.array):
            self.weight = weight
        else:
            self.quantized = weight
            mx.eval(*vars(weight.parts).values())
        self.lora_scale = 0.0
        self.silent = False  # the adapter is there, but has no effect
        self._squares: mx.array | None = None
        self._dense: mx.array | None = None

    @property
    def base(self) -> Weight:
        """The base weight, dense or quantised."""
        return self.quantized if "weight" not in self else array(self["weight"])

    @property
    def adapted(self) -> bool:
        return "lora_a" in self and not self.silent

    def attach(self, a: mx.array, b: mx.array, scale: float, m: mx.array | None = None) -> None:
        """Put an adapter on: A [.., r, in], B [.., out, r], and DoRA's lengths of the rows [out] or [E, out, 1], all
        float32; in the place of one that was there.
        """
        self.detach()
        self.lora_a, self.lora_b, self.lora_scale = a, b, scale
        if m is not None:
            self.lora_m = m
            self._squares = squares(self.base) if self._squares is None else self._squares

    def detach(self) -> None:
        """Take the adapter off."""
        for key in ("lora_a", "lora_b", "lora_m"):
            self.pop(key, None)

    @property
    def magnitude(self) -> mx.array | None:
        """DoRA's lengths of the rows, if the adapter has them."""
        return self.lora_m if self.adapted and "lora_m" in self else None

    def gains(self) -> mx.array | None:
        """What DoRA multiplies each output by, float32 [out] or [E, out]; computed now."""
        if self.magnitude is None:
            return None
        assert self._squares is not None
        norms = row_norms(self.base, self._squares, self.lora_a, self.lora_b, self.lora_scale)
        gain = self.lora_m.reshape(norms.shape) / norms
        mx.eval(gain)
        return gain


class Projection(Adapted):
    """y_..O = x_..I W_OI^T, without bias."""

    def keep_dense(self, dtype: mx.Dtype) -> None:
        """Keep an NF4 weight of few values in `dtype` beside its codes: it costs little memory, and making it dense at
        every use costs as much as a product.
        """
        base = self.base
        if isinstance(base, NF4Tensor) and base.size <= SMALL_WEIGHT:
            self._dense = base.dequantize(dtype)
            mx.eval(self._dense)

    def __call__(self, x: mx.array, *, unread: bool = False) -> mx.array:
        """`unread`: y is only differentiated and may be left out."""
        base = self.base if self._dense is None or self._dense.dtype != x.dtype else self._dense
        if not self.adapted:
            return matmul(x, base)
        assert not isinstance(base, NF4Stack)
        m_O, rows = self.magnitude, None
        if m_O is not None:
            assert self._squares is not None
            a_rI = mx.depends(self.lora_a, [x]) if gpu_geometry() else self.lora_a  # else W is dense before its time
            cross_rO = matmul(mx.stop_gradient(a_rI.astype(x.dtype)), base)
            rows = m_O, ops_lora.row_norms(self._squares, cross_rO, self.lora_a, self.lora_b, self.lora_scale)
        return adapted_matmul(x, base, self.lora_a, self.lora_b, self.lora_scale, rows, unread=unread)


class ExpertProjection(Adapted):
    """One layer of all experts, W [E, O, I]."""

    def layer(self, dtype: mx.Dtype, ordered: bool = False) -> Layer:
        """As the operations take it, in `dtype`. `ordered`: what trains was put into a room's order."""
        base = self.base
        assert not isinstance(base, NF4Tensor)
        weight = base.astype(dtype) if isinstance(base, mx.array) else base
        if not self.adapted:
            return Layer(weight, ordered=ordered)
        a, b = self.lora_a.astype(dtype), self.lora_b.astype(dtype)
        return Layer(weight, a, b, self.lora_scale, ordered, self.magnitude, self._squares)


class Embedding(Adapted):
    """The token embedding [V, D], tied with the head: one weight and one adapter serve both ways."""

    def __call__(self, tokens_BT: mx.array) -> mx.array:
        base = self.base
        assert isinstance(base, mx.array | NF4Tensor)
        h_BTD = base.rows(tokens_BT) if isinstance(base, NF4Tensor) else base[tokens_BT]
        if self.adapted:
            h_BTD = h_BTD + (self.lora_scale * self.lora_b[tokens_BT]) @ self.lora_a
        return h_BTD

    def backward(self, tokens_BT: mx.array, dh_BTD: mx.array, gradients: dict[str, mx.array]) -> dict[str, mx.array]:
        """`gradients` of this module's trainable arrays by name, the head's, plus those of the lookup."""
        index_M, dh_MD = tokens_BT.reshape(-1), dh_BTD.reshape(-1, dh_BTD.shape[-1])
        if not self.adapted:
            return {"weight": add_rows(gradients["weight"], dh_MD, index_M)}
        a_rD, b_Vr, s = self.lora_a.astype(dh_MD.dtype), self.lora_b, self.lora_scale
        da_rD = (s * b_Vr[index_M]).astype(dh_MD.dtype).T @ dh_MD
        return {
            "lora_a": gradients["lora_a"] + da_rD.astype(gradients["lora_a"].dtype),
            "lora_b": add_rows(gradients["lora_b"], s * (dh_MD @ a_rD.T), index_M),
        }

    def head(self, h: mx.array) -> tuple[mx.array, mx.array | NF4Tensor, mx.array | None, mx.array | None]:
        """What the loss needs: (h, W, u, B) with logits = h W^T + u B^T; u and B are None without an adapter."""
        base = self.base
        assert isinstance(base, mx.array | NF4Tensor)
        if not self.adapted:
            return h, base, None, None
        return h, base, self.lora_scale * (h @ self.lora_a.astype(h.dtype).T), self.lora_b

    def logits(self, h: mx.array) -> mx.array:
        """Logits [.., V] of h [.., D]: for a few rows, as in generation; the loss never makes them all."""
        h, base, u, b = self.head(h)
        y = matmul(h, base)
        return y if u is None or b is None else y + u @ b.astype(h.dtype).T
