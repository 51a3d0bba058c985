"""The section [lora] of a profile: which projections carry an adapter, of which rank, and how it starts and trains."""

import functools
import re
from collections.abc import Callable
from typing import Annotated, NamedTuple

from pydantic import Field, model_validator

from magellano.names import LayerKind, LoraInit, LoraKind, LoraTarget
from magellano.section import Positive, Section

Target = Annotated[LoraTarget, Field(strict=False)]  # TOML and JSON give strings
Ratio = Annotated[float, Field(gt=0, le=1e4)]
EXPERTS = (LoraTarget.W1, LoraTarget.W2)
_PLACE = re.compile(r"layers\.(\d{1,4})(?:-(\d{1,4}))?(?:\.(.+))?", re.ASCII)


class Pattern(NamedTuple):
    """A key of lora.rank_pattern: TARGET, layers.N, layers.N-M (both among them), or one of these with .TARGET."""

    layers: range | None
    target: LoraTarget | None

    def matches(self, target: LoraTarget, layer: int | None) -> bool:
        return (self.layers is None or layer in self.layers) and self.target in (None, target)

    @property
    def narrowness(self) -> int:
        """Of two that match, the one with more decides."""
        return 2 * (self.layers is not None) + (self.target is not None)


@functools.lru_cache(maxsize=4096)
def pattern(key: str) -> Pattern:
    """What a key of lora.rank_pattern means. ValueError for one that means nothing."""
    targets = ", ".join(LoraTarget)
    match = _PLACE.fullmatch(key)
    name = match[3] if match else key
    if name is not None and name not in set(LoraTarget):
        forms = "" if match else ", and the patterns layers.N, layers.N-M and each with .TARGET"
        raise ValueError(f"rank_pattern names {name[:60]!r}; the targets are {targets}{forms}")
    layers = None
    if match:
        layers = range(int(match[1]), int(match[2] or match[1]) + 1)
        if not layers:
            raise ValueError(f"rank_pattern {key}: the layers run backwards; write the smaller number first")
    return Pattern(layers, None if name is None else LoraTarget(name))


class LoraConfig(Section):
    """Low-rank adapters (Hu et al. 2021, arXiv 2106.09685): W + alpha / rank * B A."""

    kind: LoraKind = Field(default=LoraKind.LORA, strict=False)
    rank: Positive = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    rslora: bool = False  # alpha / sqrt(rank) in place of alpha / rank (Kalajdzievski 2023, arXiv 2312.03732)
    targets: tuple[Target, ...] = Field(default=tuple(LoraTarget), strict=False)
    ranks: dict[Target, Positive] = Field(default_factory=dict, strict=False)  # where a target's rank differs
    rank_pattern: dict[str, Positive] = Field(default_factory=dict, max_length=4096)  # a layer's: see Pattern
    init: LoraInit = Field(default=LoraInit.ZERO, strict=False)
    plus: Ratio = 1.0  # B's learning rate over A's (LoRA+: Hayou et al. 2024, arXiv 2402.12354)
    seed: Annotated[int, Field(ge=0)] = 0

    def rank_of(self, target: LoraTarget, layer: int | None = None) -> int:
        """The rank on `target` in layer `layer` (None: outside the layers): of rank_pattern's narrowest match, else of
        ranks, else rank.
        """
        patterns = ((pattern(key), rank) for key, rank in self.rank_pattern.items())
        found = [(p.narrowness, rank) for p, rank in patterns if p.matches(target, layer)]
        return max(found)[1] if found else self.ranks.get(target, self.rank)

    def without_effect(self, n_layers: int, kind: Callable[[int], LayerKind]) -> str | None:
        """A key of rank_pattern that no projection with an adapter matches in a model of such layers."""
        for key in self.rank_pattern:
            p = pattern(key)
            kinds = {kind(layer) for layer in p.layers or () if layer < n_layers}
            met = {LayerKind.MOE if target in EXPERTS else LayerKind.MAMBA for target in self.targets
                   if target is not LoraTarget.HEAD and p.target in (None, target)}  # fmt: skip
            if p.layers is not None and (p.layers[-1] >= n_layers or not kinds & met):
                return key
        return None

    @model_validator(mode="after")
    def _targets(self) -> "LoraConfig":
        if not self.targets:
            raise ValueError("targets is empty: nothing would train")
        if extra := set(self.ranks) - set(self.targets):
            raise ValueError(f"ranks names {sorted(map(str, extra))}, not among targets; add or drop them")
        if self.kind is LoraKind.DORA and LoraTarget.HEAD in self.targets:
            rest = ", ".join(f'"{target}"' for target in self.targets if target is not LoraTarget.HEAD)
            raise ValueError(f'kind "dora" is not there for the head; leave it out: targets = [{rest}]')
        return self

    @model_validator(mode="after")
    def _patterns(self) -> "LoraConfig":
        for key in self.rank_pattern:
            target = pattern(key).target
            if target is not None and target not in self.targets:
                raise ValueError(f"rank_pattern {key}: {target} is not among targets; add or drop it")
            if key in self.ranks:
                raise ValueError(f"{key} stands in ranks and in rank_pattern; drop one")
        if clash := _clash(self.rank_pattern):
            raise ValueError(f"rank_pattern {' and '.join(clash)} give a projection two ranks; make them disjoint")
        return self


def _clash(ranks: dict[str, int]) -> tuple[str, str] | None:
    """Two keys that a projection may match, neither narrower, with different ranks."""
    widest: dict[LoraTarget | None, tuple[int, str]] = {}  # of those that begin before: the last layer of the longest
    for key in sorted((key for key in ranks if pattern(key).layers), key=lambda key: (pattern(key).layers or [0])[0]):
        layers, target = pattern(key)
        assert layers
        last, other = widest.get(target, (-1, key))
        if layers[0] <= last and ranks[other] != ranks[key]:
            return other, key
        widest[target] = max((last, other), (layers[-1], key))
    return None
