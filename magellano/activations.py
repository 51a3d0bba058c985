"""Whether layers are made again in the backward pass, or their activations kept: a third of a step's time against
memory.

Shapes: D d_model, I d_inner, N d_state, R dt_rank, F what w1 makes; rows = batch * length.
"""

from magellano.backend import compute_dtype, mx, nn, on_gpu, tree_flatten
from magellano.info import memory_bytes
from magellano.model import MagellanoLM
from magellano.names import LayerKind, Recompute
from magellano.nf4 import NF4Stack, NF4Tensor
from magellano.profile import ModelConfig, TrainConfig

SHARE = 0.25  # of the machine's memory, that a CPU run may take to be faster
_FLOAT32 = 4


def recomputes(model: MagellanoLM, config: TrainConfig, rows: int, limit_gib: float = 0.0) -> bool:
    """What config.recompute means for this model and `rows` rows at once (see `decided`)."""
    return decided(
        config.recompute, held(model) + kept(model.config, rows, compute_dtype(config.compute).size), limit_gib
    )


def decided(recompute: Recompute, needed: int, limit_gib: float) -> bool:
    """Whether layers are made again where `needed` bytes would keep all activations. "auto" on a CPU: False where these
    are at most SHARE of the machine's memory and no more than `limit_gib`, if there is one. The same on every start on
    one machine, so that a resumed run repeats the bits.
    """
    if recompute is not Recompute.AUTO:
        return recompute is Recompute.ALWAYS
    memory = memory_bytes()
    if on_gpu() or memory is None:
        return True
    return needed > min(SHARE * memory, limit_gib * (1 << 30) or float("inf"))


def held(model: MagellanoLM) -> int:
    """Bytes of the weights, and of the gradients and the optimiser's float32 states of those that train."""
    trainable = sum(a.size for a in dict(tree_flatten(model.trainable_parameters())).values())
    weights = sum(a.nbytes for a in dict(tree_flatten(model.parameters())).values())
    return weights + sum(map(_quantized, model.modules())) + 3 * _FLOAT32 * trainable


def _quantized(module: nn.Module) -> int:
    """The codes, and what is kept dense beside them: no parameters for MLX."""
    found: list[NF4Tensor | NF4Stack | mx.array | None] = [getattr(module, n, None) for n in ("quantized", "_dense")]
    return sum(weight.nbytes for weight in found if weight is not None)


def kept(config: ModelConfig, rows: int, width: int) -> int:
    """Bytes of all layers' activations at `width` bytes a value: each value with its gradient, since MLX keeps both
    while a gradient is being made. On a CPU 0.98 to 1.15 times what was measured in the demo and phase1.
    """
    return 2 * width * rows * sum(_values(config, config.kind(layer)) for layer in range(config.n_layers))


def _values(c: ModelConfig, kind: LayerKind) -> int:
    """A row's activations in one layer; what an adapter adds is thin, and its operations keep nothing else."""
    d, i, f = c.d_model, c.d_inner, c.d_up
    if kind is LayerKind.MAMBA:
        # projections to 2I, R + 2N, I and D; both streams cut out, after the convolution, after the scan; norm, sum
        return 7 * i + c.dt_rank + 2 * c.d_state + 3 * d
    # per copy of a token: gathered, w1, after relu, w2; and per token norm, mixture and sum
    return c.top_k * 2 * (f + d) + 3 * d
