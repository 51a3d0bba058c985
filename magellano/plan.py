"""What a fine-tune will need, from shapes alone: nothing is allocated.

Estimates, to be held against the measured peak in the run's report. Bytes unless said otherwise.
Shapes: B batch, T time, D d_model, I d_inner, N d_state, R dt_rank, F d_ff, V vocabulary.
"""

import math
from dataclasses import dataclass

from magellano.layout import ParamSpec, count, lora_count, lora_shapes, parameters
from magellano.names import Compute, LayerKind, LoraTarget, StateDtype
from magellano.ops.nf4 import BLOCK, SCALE_BLOCK
from magellano.profile import ModelConfig, Profile

FLOAT32, FLOAT16 = 4, 2


@dataclass(frozen=True)
class Plan:
    """Memory by part in bytes, and the arithmetic of one optimiser step."""

    parameters: int
    trainable: int
    memory: dict[str, int]
    tokens_per_step: int
    flops_per_step: int

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    @property
    def share(self) -> float:
        """Trainable parameters over those of the base."""
        return self.trainable / self.parameters


def fine_tune(profile: Profile, wide_compute: bool) -> Plan:
    """The plan of the train stage. `wide_compute`: whether compute = "auto" means float32 here (a CPU) or 16 bits."""
    specs = parameters(profile.model)
    quantized = [s for s in specs if _quantizes(profile, s)]
    trainable = lora_count(profile.model, profile.lora)
    narrow = profile.train.compute in (Compute.FLOAT16, Compute.BFLOAT16) or (
        profile.train.compute is Compute.AUTO and not wide_compute
    )
    width = FLOAT16 if narrow else FLOAT32
    state = FLOAT32 if profile.train.state is StateDtype.FLOAT32 else FLOAT16
    memory = {
        "weights in 4 bits": sum(-(-s.size // 2) for s in quantized),
        "their scales": sum(_scale_bytes(s) for s in quantized),
        "other weights": FLOAT32 * sum(s.size for s in specs if s not in quantized),
        "adapters": FLOAT32 * trainable,
        "gradients": FLOAT32 * trainable,
        "optimiser": 2 * state * trainable,
        "layer inputs kept": _kept(profile, width),
        "largest layer, recomputed": max(_layer(profile, kind, width) for kind in _kinds(profile.model)),
        "logits of one chunk": 3 * FLOAT32 * min(profile.train.loss_chunk, _rows(profile)) * profile.model.vocab_size,
        "largest weight, dequantised": width * max((_matrix(s) for s in quantized), default=0),
    }
    tokens = _rows(profile) * profile.train.accumulate
    return Plan(count(profile.model), trainable, memory, tokens, _flops_per_token(profile) * tokens)


def _quantizes(profile: Profile, spec: ParamSpec) -> bool:
    return spec.target is not None and (spec.target is not LoraTarget.HEAD or profile.quantize.embedding)


def _scale_bytes(spec: ParamSpec) -> int:
    """8 bits a block, float32 a block of blocks, one offset per matrix (per expert in a stack)."""
    experts = spec.size // _matrix(spec)
    blocks = -(-_matrix(spec) // BLOCK)
    return experts * (blocks + FLOAT32 * (-(-blocks // SCALE_BLOCK)) + FLOAT32)


def _matrix(spec: ParamSpec) -> int:
    return spec.shape[-1] * spec.shape[-2]


def _rows(profile: Profile) -> int:
    return profile.train.batch * profile.data.seq_len


def _kinds(model: ModelConfig) -> set[LayerKind]:
    return {model.kind(layer) for layer in range(model.n_layers)}


def _kept(profile: Profile, width: int) -> int:
    """Gradient checkpointing keeps each layer's input [B, T, D] and nothing else."""
    return (profile.model.n_layers + 1) * _rows(profile) * profile.model.d_model * width


def _layer(profile: Profile, kind: LayerKind, width: int) -> int:
    """Activations of one layer while its backward pass runs, each value with its gradient."""
    m, rows = profile.model, _rows(profile)
    if kind is LayerKind.MAMBA:
        # x and z, after the convolution, dt, y, gated y; and b, c, dt before its projection
        values = rows * (6 * m.d_inner + 2 * m.d_state + m.dt_rank + 2 * m.d_model)
    else:
        # per copy of a token: gathered input, hidden before and after relu, output
        values = rows * (m.top_k * (2 * m.d_ff + 2 * m.d_model) + 2 * m.d_model)
    return 2 * width * values


def _flops_per_token(profile: Profile) -> int:
    """Forward, recomputation and the gradient to activations, 2 operations a weight each; adapters add their own."""
    m = profile.model
    active = adapters = 0
    for spec in parameters(m):
        routed = len(spec.shape) == 3 and spec.target is not None
        active += spec.size * m.top_k // m.n_experts if routed else spec.size
        if pair := lora_shapes(spec, profile.lora):
            size = sum(math.prod(shape) for shape in pair)
            adapters += size * m.top_k // m.n_experts if routed else size
    scan = 9 * m.d_inner * m.d_state * sum(m.kind(layer) is LayerKind.MAMBA for layer in range(m.n_layers))
    return 6 * active + 3 * scan + 8 * adapters
