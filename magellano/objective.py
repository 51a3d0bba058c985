"""What [train] minimises, with its keys, and what that asks of the rest of a profile."""

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from magellano.names import DataFormat, LoraInit, Objective
from magellano.section import Section

if TYPE_CHECKING:
    from magellano.profile import Profile


class Objectives(Section):
    """The part of [train] that says what is minimised."""

    objective: Objective = Field(default=Objective.SFT, strict=False)
    dpo_beta: Annotated[float, Field(gt=0.0, le=10.0)] = 0.1  # how near to the base the adapter is held
    dpo_label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = 0.0  # share of pairs that may be the wrong way round


KEYS = frozenset(Objectives.model_fields)


def fault(profile: "Profile") -> str | None:
    """What does not go together, with its remedy; None for nothing."""
    pairs, dpo = profile.data.pairs, profile.train.objective is Objective.DPO
    if pairs != dpo:
        return (
            f'data.format "{DataFormat.PREFERENCE}" and train.objective "{Objective.DPO}" belong together; set both or '
            "neither"
        )
    if dpo and profile.loss.has_entropy:
        return 'loss.kind "renyi" has no effect on train.objective "dpo"; leave it out'
    if dpo and profile.lora.init is LoraInit.LOFTQ:
        return 'lora.init "loftq" starts away from the base that train.objective "dpo" compares with; leave it out'
    pretrain = profile.pretrain
    if pretrain and (pretrain.data.pairs or pretrain.train.objective is Objective.DPO):
        return "pretrain: a base cannot be trained on preferences; give it text"
    return None
