"""Flow `train`: tokenize -> quantize -> attach_lora -> train -> checkpoint -> evaluate; pretrain before, if need be."""

from typing import Any

from prefect import flow

from flows.chain import Chain
from flows.names import run_name
from magellano.names import Stage
from tasks import settings


@flow(
    name="train",
    flow_run_name=run_name,
    persist_result=True,
    result_serializer="json",
    result_storage=settings.results(),
)
def train(profile: str, overrides: dict[str, Any] = {}, rerun: list[Stage] = []) -> dict[str, Any]:  # noqa: B006 (the UI's form shows them)
    """Fine-tune by a profile; stages whose inputs have not changed are reused.

    Args:
        profile: name of a profile, or path of a profile file.
        overrides: settings by dotted name, as {"train.steps": 10}.
        rerun: stages to build again, with all that build on them.
    """
    with Chain(profile, overrides, rerun) as chain:
        chain.reach(Stage.TOKENIZE)
        chain.reach(Stage.EVALUATE)
        return chain.result()
