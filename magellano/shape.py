"""[model]: the shape of a model."""

from typing import Annotated

from pydantic import Field, model_validator

from magellano.names import FinalNorm, Gate, Hidden, LayerKind
from magellano.section import NonNegative, Positive, Section


class ModelConfig(Section):
    """The Mamba-MoE hybrid's shape. Layer l (from 0) is MoE where l % moe_every == moe_every - 1, else Mamba."""

    d_model: Positive  # D
    n_layers: Positive
    n_experts: Positive = 8  # E
    top_k: Positive = 2
    d_ff: Positive  # F
    d_state: Positive = 16  # N
    d_conv: Positive = 4  # K
    expand: Positive = 2
    dt_rank: Positive = 16  # R
    vocab_size: Annotated[int, Field(ge=257, le=1 << 16)] = 50257  # V: 256 bytes and end-of-text; 16-bit ids
    moe_every: Positive = 4
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    dt_norm_eps: NonNegative = 0.0  # above 0: dt, B and C are normed, without weights (Falcon-Mamba)
    tied: bool = True  # the head is the embedding
    hidden: Hidden = Field(default=Hidden.RELU, strict=False)  # these three: as BlackMamba has them
    gate: Gate = Field(default=Gate.SOFTMAX, strict=False)
    final_norm: FinalNorm = Field(default=FinalNorm.RMS, strict=False)

    @property
    def d_inner(self) -> int:
        return self.expand * self.d_model  # I

    @property
    def d_up(self) -> int:
        """Width of what an expert's first layer makes: F, or 2F where it is gated."""
        return 2 * self.d_ff if self.hidden.gated else self.d_ff

    @property
    def of_its_own(self) -> bool:
        """Whether it is this project's model alone, without what BlackMamba has besides."""
        return (self.hidden, self.gate, self.final_norm) == (Hidden.RELU, Gate.SOFTMAX, FinalNorm.RMS)

    def kind(self, layer: int) -> LayerKind:
        """What layer `layer` (from 0) is."""
        return LayerKind.MOE if layer % self.moe_every == self.moe_every - 1 else LayerKind.MAMBA

    @model_validator(mode="after")
    def _possible(self) -> "ModelConfig":
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k {self.top_k} is more than n_experts {self.n_experts}; lower top_k")
        if self.moe_every < 2:
            raise ValueError("moe_every must be 2 or more: with 1 no layer would be a Mamba layer")
        return self
