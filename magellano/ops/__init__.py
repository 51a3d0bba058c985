"""Operations: each file holds one contract, its plain-MLX reference, its gradient and the choice of back end."""

from magellano.ops.causal_conv import causal_conv
from magellano.ops.selective_scan import selective_scan

__all__ = ["causal_conv", "selective_scan"]
