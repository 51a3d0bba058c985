"""Task `pretrain`: tokens -> a dense base, trained in full."""

from typing import Any

from prefect import State, task

from magellano.artifacts import ArtifactRef
from magellano.names import Stage
from magellano.profile import Profile
from tasks.stage import Bench, carry_out, options


@task(**options(Stage.PRETRAIN))
def pretrain(profile: Profile, tokens: ArtifactRef, rerun: str = "") -> State[ArtifactRef]:
    """The base that [pretrain.train] makes of the seeded initial weights, in a child process."""

    def make(bench: Bench) -> dict[str, Any]:
        return bench.isolated(profile, tokens)

    return carry_out(Stage.PRETRAIN, profile, {"tokens": tokens}, make, rerun)
