"""Task `quantize`: base -> NF4 base."""

from typing import Any

from prefect import State, task

from magellano import pipeline
from magellano.artifacts import ArtifactRef, Inputs
from magellano.names import BaseSource, Stage
from magellano.profile import Profile
from tasks.stage import Bench, carry_out, options


@task(**options(Stage.QUANTIZE))
def quantize(profile: Profile, base: ArtifactRef | None, rerun: str = "") -> State[ArtifactRef]:
    """The base in 4 bits; `base` is the pretrained one, or None where base.source names a seed or a folder."""
    from magellano.stages import quantize as stage

    inputs: Inputs = {} if base is None else {"base": base}
    folder = None
    if profile.base.source is BaseSource.FOLDER:
        inputs, folder = {"base": pipeline.base_digest(profile)}, pipeline.base_folder(profile)

    def make(bench: Bench) -> dict[str, Any]:
        return stage.run(bench.out, profile, folder if base is None else bench.path(base), bench.progress)

    return carry_out(Stage.QUANTIZE, profile, inputs, make, rerun)
