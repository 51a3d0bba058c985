"""Projections that may be dense or NF4, with or without an adapter: y = x W^T + s (x A^T) B^T.

QLoRA (Dettmers et al. 2023, arXiv 2305.14314): W is frozen in 4 bits and dequantised on the fly, only A and B train
(Hu et al. 2021, arXiv 2106.09685). Dense W trains in full.

Shapes: I in, O out, r rank, E experts, M rows, V vocabulary, D d_model.
"""

from magellano.backend import mx, nn
from magellano.layout import SMALL_WEIGHT
from magellano.nf4 import NF4Stack, NF4Tensor
from magellano.ops import nf4_matmul
from magellano.ops.add_rows import add_rows
from magellano.ops.experts import Layer
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
        self._dense: mx.array | None = None

    @property
    def base(self) -> Weight:
        """The base weight, dense or quantised."""
        return self.quantized if "weight" not in self else array(self["weight"])

    @property
    def adapted(self) -> bool:
        return "lora_a" in self

    def attach(self, a: mx.array, b: mx.array, scale: float) -> None:
        """Put an adapter on: A [.., r, in], B [.., out, r], both float32."""
        self.lora_a, self.lora_b, self.lora_scale = a, b, scale


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
        return adapted_matmul(x, base, self.lora_a, self.lora_b, self.lora_scale, unread=unread)


class ExpertProjection(Adapted):
    """One layer of all experts, W [E, O, I]."""

    def layer(self, dtype: mx.Dtype, ordered: bool = False) -> Layer:
        """As the operations take it, in `dtype`. `ordered`: what trains was put into a room's order."""
        base = self.base
        assert not isinstance(base, NF4Tensor)
        weight = base.astype(dtype) if isinstance(base, mx.array) else base
        if not self.adapted:
            return Layer(weight, ordered=ordered)
        return Layer(weight, self.lora_a.astype(dtype), self.lora_b.astype(dtype), self.lora_scale, ordered)


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
