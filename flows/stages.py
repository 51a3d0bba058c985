"""Flow `stages`: one stage alone; what it builds on is reused, or built where missing."""

from typing import Any

from prefect import flow

from flows.chain import Chain
from flows.names import run_name
from magellano.names import Stage
from tasks import settings


@flow(
    name="stages",
    flow_run_name=run_name,
    persist_result=True,
    result_serializer="json",
    result_storage=settings.results(),
)
def stages(stage: Stage, profile: str, overrides: dict[str, Any] = {}, rerun: bool = False) -> dict[str, Any]:  # noqa: B006
    """Carry out one stage of a profile.

    Args:
        stage: the stage to reach.
        profile: name of a profile, or path of a profile file.
        overrides: settings by dotted name, as {"train.steps": 10}.
        rerun: build the stage again although its artifact is there.
    """
    chain = Chain(profile, overrides, [stage] if rerun else [])
    chain.reach(stage)
    return chain.result()
