"""Task `attach_lora`: NF4 base -> the adapter at its start."""

from typing import Any

from prefect import State, task

from magellano.artifacts import ArtifactRef
from magellano.names import Stage
from magellano.profile import Profile
from tasks.stage import Bench, carry_out, options


@task(**options(Stage.ATTACH_LORA))
def attach_lora(profile: Profile, base: ArtifactRef, rerun: str = "") -> State[ArtifactRef]:
    """The starting adapter of [lora] for the quantised `base`."""
    from magellano.stages import attach_lora as stage

    def make(bench: Bench) -> dict[str, Any]:
        return stage.run(bench.out, profile, bench.path(base))

    return carry_out(Stage.ATTACH_LORA, profile, {"base": base}, make, rerun)
