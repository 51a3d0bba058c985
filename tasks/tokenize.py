"""Task `tokenize`: data files -> packed token shards, held-out split, accounting."""

from typing import Any

from prefect import State, task

from magellano import pipeline
from magellano.artifacts import ArtifactRef
from magellano.names import Stage
from magellano.profile import DataConfig, Profile
from tasks.stage import Bench, carry_out, options


@task(**options(Stage.TOKENIZE))
def tokenize(profile: Profile, data: DataConfig, rerun: str = "") -> State[ArtifactRef]:
    """The tokens of `data`, the profile's own or those of its [pretrain]."""
    from magellano.data import readers
    from magellano.stages import tokenize as stage

    def make(bench: Bench) -> dict[str, Any]:
        return stage.run(bench.out, data, profile.model.vocab_size, bench.progress, pipeline.tokenizer(profile))

    return carry_out(Stage.TOKENIZE, profile, {"data": readers.digest(data)}, make, rerun, data)
