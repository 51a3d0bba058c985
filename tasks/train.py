"""Task `train`: tokens, NF4 base, starting adapter -> the trained state."""

from typing import Any

from prefect import State, task

from magellano.artifacts import ArtifactRef
from magellano.names import Stage
from magellano.profile import Profile
from tasks.stage import Bench, carry_out, options


@task(**options(Stage.TRAIN))
def train(
    profile: Profile, tokens: ArtifactRef, base: ArtifactRef, adapter: ArtifactRef, rerun: str = ""
) -> State[ArtifactRef]:
    """The adapter that [train] makes of the starting one, in a child process; continues what an interrupted run left in
    its work folder.
    """

    def make(bench: Bench) -> dict[str, Any]:
        return bench.isolated(profile, tokens, base, adapter)

    return carry_out(Stage.TRAIN, profile, {"tokens": tokens, "base": base, "adapter": adapter}, make, rerun)
