"""Task `checkpoint`: the trained state -> a sealed release."""

from typing import Any

from prefect import State, task

from magellano.artifacts import ArtifactRef
from magellano.names import Stage
from magellano.profile import Profile
from tasks.stage import Bench, carry_out, options


@task(**options(Stage.CHECKPOINT))
def checkpoint(
    profile: Profile, trained: ArtifactRef, base: ArtifactRef, tokens: ArtifactRef, rerun: str = ""
) -> State[ArtifactRef]:
    """The release: adapter in PEFT form, config, tokenizer, and the digests of all that it came from."""
    from magellano.stages import checkpoint as stage

    inputs = {"trained": trained, "base": base, "tokens": tokens}

    def make(bench: Bench) -> dict[str, Any]:
        lineage = {name: ref.model_dump(mode="json") for name, ref in inputs.items()}
        return stage.run(bench.out, profile, bench.path(trained), bench.path(base), bench.path(tokens), lineage)

    # The release names its base's folder, so that a base of equal content under another key makes another release.
    return carry_out(Stage.CHECKPOINT, profile, {**inputs, "base folder": base.key}, make, rerun)
