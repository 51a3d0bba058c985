"""Task `gate`: the new release against the promoted one, on the fixed held-out set."""

from typing import Any

from prefect import task
from prefect.artifacts import create_table_artifact
from prefect.cache_policies import NO_CACHE

from magellano import gate as core
from magellano.artifacts import ArtifactRef
from magellano.nightly import News
from magellano.profile import Profile
from tasks import background, settings
from tasks.progress import StageProgress
from tasks.stage import open_store


@task(
    name="gate",
    persist_result=True,
    result_serializer="json",
    result_storage=settings.results(),
    cache_policy=NO_CACHE,
)
def gate(profile: Profile, release: ArtifactRef, evaluation: ArtifactRef, news: News, run: int) -> dict[str, Any]:
    """Measure, decide, enter in the registry; see magellano.gate.judge."""
    with StageProgress("gate") as progress:
        found = core.judge(
            open_store(), profile, release, evaluation,
            made=news.made, data=news.files, run=run, progress=progress,
        )  # fmt: skip
    rows = core.table(found)
    background.attempt(
        "gate artifact",
        lambda: create_table_artifact(table=rows, key="gate", description=f"{found['decision']}: {found['reason']}"),
    )
    return found
