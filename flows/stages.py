"""Flow `stages`: one stage alone; what it builds on is reused, or built where missing."""

from typing import Any

from prefect import flow

from flows.chain import Chain
from flows.names import run_name
from magellano import ledger
from magellano.errors import InputError
from magellano.names import Stage
from tasks import settings


@flow(
    name="stages",
    flow_run_name=run_name,
    persist_result=True,
    result_serializer="json",
    result_storage=settings.results(),
)
def stages(
    stage: Stage, profile: str = "", overrides: dict[str, Any] = {}, rerun: bool = False, run: int = 0  # noqa: B006
) -> dict[str, Any]:  # fmt: skip
    """Carry out one stage of a profile, or of an earlier run with the profile that it kept.

    Args:
        stage: the stage to reach.
        profile: name of a profile, or path of a profile file; not read where a run is given.
        overrides: settings by dotted name, as {"train.steps": 10}.
        rerun: build the stage again although its artifact is there.
        run: the number of an earlier run; 0 for none.
    """
    with Chain(profile_of(profile, run), overrides, [stage] if rerun else []) as chain:
        chain.reach(stage)
        return chain.result()


def profile_of(profile: str, run: int) -> str:
    """The profile to read: the one given, or the file that a run kept. InputError where neither is given."""
    if not profile and not run:
        raise InputError("neither profile nor run is given; give one")
    return str(ledger.profile_file(ledger.find(str(run)))) if run else profile
