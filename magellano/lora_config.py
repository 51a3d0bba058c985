"""The section [lora] of a profile: which projections carry an adapter, of which rank, and how it starts and trains."""

from typing import Annotated

from pydantic import Field, model_validator

from magellano.names import LoraTarget
from magellano.section import Positive, Section

Target = Annotated[LoraTarget, Field(strict=False)]  # TOML and JSON give strings
Ratio = Annotated[float, Field(gt=0, le=1e4)]


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): W + alpha / rank * B A."""

    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    rslora: bool = False  # alpha / sqrt(rank) in place of alpha / rank (Kalajdzievski 2023, arXiv 2312.03732)
    targets: tuple[Target, ...] = Field(default=tuple(LoraTarget), strict=False)
    ranks: dict[Target, Positive] = Field(default_factory=dict, strict=False)  # where a target's rank differs
    plus: Ratio = 1.0  # B's learning rate over A's (LoRA+: Hayou et al. 2024, arXiv 2402.12354)
    seed: Annotated[int, Field(ge=0)] = 0

    def rank_of(self, target: LoraTarget) -> int:
        return self.ranks.get(target, self.rank)

    @model_validator(mode="after")
    def _targets(self) -> "LoraConfig":
        if not self.targets:
            raise ValueError("targets is empty: nothing would train")
        if extra := set(self.ranks) - set(self.targets):
            raise ValueError(f"ranks names {sorted(map(str, extra))}, not among targets; add or drop them")
        return self
