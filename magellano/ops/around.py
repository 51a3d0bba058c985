"""What a matrix-vector product does to its rows before and after, in the same launch: y = residual + act(norm(x) W^T +
scale low B^T). In decoding launches and not arithmetic are what takes the time.

Shapes: M rows of y, I in, O out, r rank, E experts.
"""

import functools
import struct
from dataclasses import dataclass

from magellano.backend import mx
from magellano.ops.host import KERNELS, Template
from magellano.ops.lazy import constant

HEADER = (KERNELS / "matvec.h").read_text(encoding="utf-8")
INPUTS = ("norm", "low", "b", "residual")  # of the kernels


@functools.cache
def placeholder() -> mx.array:
    """Stands in for an array that is not used."""
    return constant([0.0] * 8, mx.float32)


def bits(number: float) -> int:
    """A non-negative float32 as an integer, which a kernel's template can hold; the texts turn it back by k_u2f."""
    return int(struct.unpack("<I", struct.pack("<f", number))[0])


@dataclass(frozen=True)
class Around:
    """Each part is left out by default. `norm_I`, `eps`: an RMS norm of x (Zhang & Sennrich 2019, arXiv 1910.07467).
    `low_Mr`: the adapter's thin product A norm(x), float32, a row for each of y; `b`: [O, r] or [E, O, r].
    """

    norm_I: mx.array | None = None
    eps: float = 0.0
    low_Mr: mx.array | None = None
    b: mx.array | None = None
    scale: float = 0.0
    relu: bool = False
    residual_MO: mx.array | None = None

    def arrays(self) -> list[mx.array]:
        """As the kernels take them."""
        norm_I = None if self.norm_I is None else self.norm_I.astype(mx.float32)
        given = (norm_I, self.low_Mr, self.b, self.residual_MO)
        return [placeholder() if a is None else a for a in given]

    def template(self, x: mx.array, out: mx.Dtype) -> Template:
        """The kernels' names for it and for the types of x and y."""
        return {
            "T": x.dtype, "TY": out,
            "NORM": self.norm_I is not None, "EPS_BITS": bits(self.eps), "RELU": self.relu,
            "RANK": 0 if self.low_Mr is None else self.low_Mr.shape[-1], "SCALE_BITS": bits(self.scale),
            "RESIDUAL": self.residual_MO is not None,
        }  # fmt: skip

    def before(self, x_MI: mx.array) -> mx.array:
        """What the matrix gets, by definition, in float32."""
        x_MI = x_MI.astype(mx.float32)
        return x_MI if self.norm_I is None else mx.fast.rms_norm(x_MI, self.norm_I.astype(mx.float32), self.eps)

    def after(self, y_MO: mx.array, expert_M: mx.array | None, out: mx.Dtype) -> mx.array:
        """What becomes of the product, by definition."""
        if self.low_Mr is not None and self.b is not None:
            b = self.b.astype(mx.float32)
            low_Mr = self.low_Mr[..., None]
            more = b.reshape(-1, b.shape[-1]) @ low_Mr if b.ndim == 2 or expert_M is None else b[expert_M] @ low_Mr
            y_MO = y_MO + self.scale * more.squeeze(-1)
        return self.end(y_MO, out)

    def end(self, y_MO: mx.array, out: mx.Dtype) -> mx.array:
        """The last of it, behind the adapter."""
        if self.relu:
            y_MO = mx.maximum(y_MO, 0.0)
        return (y_MO if self.residual_MO is None else y_MO + self.residual_MO.astype(mx.float32)).astype(out)
