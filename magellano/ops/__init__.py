"""Operations: each file holds one contract, its plain-MLX reference, its gradient and the choice of back end."""

from magellano.ops.causal_conv import causal_conv
from magellano.ops.cross_entropy import linear_cross_entropy, token_scores
from magellano.ops.experts import feed_forward
from magellano.ops.lora import adapted_matmul
from magellano.ops.moe import route
from magellano.ops.nf4 import nf4_matmul
from magellano.ops.selective_scan import selective_scan

__all__ = [
    "adapted_matmul",
    "causal_conv",
    "feed_forward",
    "linear_cross_entropy",
    "nf4_matmul",
    "route",
    "selective_scan",
    "token_scores",
]
