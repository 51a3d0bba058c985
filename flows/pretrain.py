"""Flow `pretrain`: trains a base in full, so that a fine-tune has something to stand on."""

from typing import Any

from prefect import flow

from flows.chain import Chain
from flows.names import run_name
from magellano.names import Stage
from tasks import settings


@flow(
    name="pretrain",
    flow_run_name=run_name,
    persist_result=True,
    result_serializer="json",
    result_storage=settings.results(),
)
def pretrain(profile: str, overrides: dict[str, Any] = {}, rerun: bool = False) -> dict[str, Any]:  # noqa: B006 (the UI's form shows it)
    """Train the base of a profile's [pretrain] section.

    Args:
        profile: name of a profile, or path of a profile file.
        overrides: settings by dotted name, as {"pretrain.train.steps": 10}.
        rerun: train it again although it is there.
    """
    with Chain(profile, overrides, [Stage.PRETRAIN] if rerun else []) as chain:
        chain.reach(Stage.PRETRAIN)
        return chain.result()
