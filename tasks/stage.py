"""What every stage's task shares: its Prefect options, and "reuse the artifact or build it".

The artifact store is the only cache. Prefect's own would go on saying Cached over an artifact deleted or damaged,
so a task looks into the store each time and returns the state `Cached` itself; Prefect keeps the small JSON reference.
"""

import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict
from uuid import uuid4

from prefect import State
from prefect.cache_policies import CachePolicy
from prefect.states import Completed

from magellano import artifacts, isolation, pipeline
from magellano.artifacts import ArtifactRef, Inputs, Store
from magellano.names import Stage
from magellano.profile import DataConfig, Profile
from magellano.progress import Progress
from tasks import publish, settings
from tasks.progress import StageProgress

log = logging.getLogger("magellano.tasks")

CACHED = "Cached"  # the name that Prefect gives, and its UI knows, for a state that reused a result


class Options(TypedDict):
    """Arguments of `@task`."""

    name: str
    persist_result: bool
    result_serializer: str
    result_storage: Path
    cache_policy: CachePolicy


def options(stage: Stage) -> Options:
    """`@task(**options(stage))`: the reference is kept as JSON, under a name that no later run will hit."""
    never = CachePolicy.from_cache_key_fn(lambda context, parameters: f"{stage}-{uuid4().hex}")
    return Options(
        name=stage.value,
        persist_result=True,
        result_serializer="json",
        result_storage=settings.results(),
        cache_policy=never,
    )


def open_store() -> Store:
    """The store below $MAGELLANO_HOME. Files are hashed before use; MAGELLANO_VERIFY=sizes compares sizes alone."""
    return Store(artifacts.home(), deep=os.environ.get("MAGELLANO_VERIFY") != "sizes")


def carry_out(
    stage: Stage, profile: Profile, inputs: Inputs, make: Callable[["Bench"], dict[str, Any]], rerun: str = "",
    data: DataConfig | None = None,
) -> State[ArtifactRef]:  # fmt: skip
    """Reuse the stage's artifact or build it by `make`. `rerun`: the id of a run that wants it built again."""
    store, version, config = open_store(), pipeline.STAGES[stage].version, pipeline.settings(stage, profile, data)
    key = artifacts.stage_key(stage, version, config, inputs)
    with StageProgress(stage) as progress:
        built = store.build(
            stage, key, version=version, inputs=inputs, config=config, rerun=rerun,
            make=lambda out: make(Bench(stage, key, store, out, progress)),
        )  # fmt: skip
    ref, said = built.ref, "reused" if built.reused else "built"
    log.info("%-12s %s  %s", stage, said, store.path(ref))
    publish.stage_artifacts(store, ref, built.reused)
    return Completed(name=CACHED if built.reused else None, message=f"{said} {ref.stage}/{ref.key}", data=ref)


class Bench:
    """What a stage works with while it is built: the empty folder, its progress, and other artifacts' folders."""

    def __init__(self, stage: Stage, key: str, store: Store, out: Path, progress: Progress) -> None:
        self._stage, self._key, self._store = stage, key, store
        self.out, self.progress = out, progress

    def path(self, ref: ArtifactRef) -> Path:
        return self._store.path(ref)

    def work(self) -> Path:
        """The folder that an interrupted stage continues from."""
        return self._store.work(self._stage, self._key)

    def isolated(self, profile: Profile, *inputs: ArtifactRef) -> dict[str, Any]:
        """Train in a child process, which holds this artifact's lock as long as it lives."""
        folders, lock = [self.path(ref) for ref in inputs], self._store.lock(self._stage, self._key)
        return isolation.run(self._stage, self.out, profile, folders, self.work(), self.progress, lock)
