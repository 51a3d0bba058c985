"""Task `evaluate`: release, held-out split, base -> measures of both, samples, pictures, verdict."""

from typing import Any

from prefect import State, task

from magellano.artifacts import ArtifactRef
from magellano.names import Stage
from magellano.profile import Profile
from tasks.stage import Bench, carry_out, options


@task(**options(Stage.EVALUATE))
def evaluate(
    profile: Profile, release: ArtifactRef, tokens: ArtifactRef, base: ArtifactRef, rerun: str = ""
) -> State[ArtifactRef]:
    """Base and release on the same held-out split."""
    from magellano.stages import evaluate as stage

    def make(bench: Bench) -> dict[str, Any]:
        return stage.run(bench.out, profile, bench.path(release), bench.path(tokens), bench.path(base), bench.progress)

    return carry_out(Stage.EVALUATE, profile, {"release": release, "tokens": tokens, "base": base}, make, rerun)
