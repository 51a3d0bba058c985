"""What a gated expert does between its layers: act(a) * b of the two halves a and b of h, act being silu (SwiGLU) or
the exact gelu (GEGLU) (Shazeer 2020, arXiv 2002.05202). In plain MLX alone, in float32; relu's kernel is in experts.py.

Shapes: n experts of a part with C rows each, R = n*C, F hidden.
"""

import math

from magellano.backend import mx
from magellano.names import Hidden


def forward(h_nCX: mx.array, hidden: Hidden) -> mx.array:
    """[.., F] in h's dtype from h [.., 2F]; for relu from h [.., F]."""
    if hidden is Hidden.RELU:
        return mx.maximum(h_nCX, 0)
    a, b = mx.split(h_nCX.astype(mx.float32), 2, axis=-1)
    return (_act(a, hidden)[0] * b).astype(h_nCX.dtype)


def backward(da_nCF: mx.array, h_nCX: mx.array, gate_R: mx.array, hidden: Hidden) -> tuple[mx.array, mx.array]:
    """gate * the gradient of h, shaped as h, and for each row da . forward(h), float32."""
    a, b = mx.split(h_nCX.astype(mx.float32), 2, axis=-1)
    da = da_nCF.astype(mx.float32)
    value, slope = _act(a, hidden)
    dgate_R = (da * value * b).sum(axis=-1).reshape(-1)
    da = gate_R.reshape(*da.shape[:-1], 1) * da
    return mx.concatenate([da * b * slope, da * value], axis=-1).astype(h_nCX.dtype), dgate_R


def _act(a: mx.array, hidden: Hidden) -> tuple[mx.array, mx.array]:
    """The activation and its derivative."""
    if hidden is Hidden.SWIGLU:
        s = mx.sigmoid(a)
        return a * s, s * (1 + a * (1 - s))
    below = 0.5 * (1 + mx.erf(a / math.sqrt(2)))  # the normal distribution's share below a
    return a * below, below + a * mx.exp(-0.5 * a * a) / math.sqrt(2 * math.pi)
