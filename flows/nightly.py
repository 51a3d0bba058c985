"""Flow `nightly`: nothing new, no training; else tokenize ... evaluate, and the gate decides what becomes of it."""

import logging
import random
import time
from typing import Any

from prefect import State, flow
from prefect.context import FlowRunContext
from prefect.runtime import flow_run
from prefect.states import Completed

from flows.chain import Chain
from flows.names import run_name
from magellano.names import Stage
from tasks import settings

log = logging.getLogger("magellano.flows")


@flow(
    name="nightly",
    flow_run_name=run_name,
    persist_result=True,
    result_serializer="json",
    result_storage=settings.results(),
)
def nightly(
    profile: str, overrides: dict[str, Any] = {}, force: bool = False, jitter_minutes: float = 0.0  # noqa: B006
) -> State[dict[str, Any]]:  # fmt: skip
    """Train where data, base or settings are new since the last judged run, and promote what passes the gate.

    Args:
        profile: name of a profile, or path of a profile file.
        overrides: settings by dotted name, as {"gate.min_gain_percent": 1.0}.
        force: run although nothing is new.
        jitter_minutes: a run that a schedule started waits up to so long first: not all machines start in one minute.
    """
    wait(jitter_minutes)
    with Chain(profile, overrides) as chain:
        news = chain.news()
        if not news.anything and not force:
            return Completed(name="Nothing new", message=news.text, data=chain.nothing_new(news))
        chain.reach(Stage.TOKENIZE)
        chain.reach(Stage.EVALUATE)
        decision = chain.judge(news)
        return Completed(name=decision.capitalize(), message=f"{decision}: {news.text}", data=chain.result())


def wait(minutes: float) -> None:
    """In a scheduled run sleep a share of `minutes` that depends on the run alone; not again where it is retried."""
    if minutes > 0 and scheduled() and int(flow_run.run_count or 1) <= 1:
        seconds = random.Random(str(flow_run.id)).uniform(0, 60 * minutes)
        log.info("starting in %.0f s: a share of jitter_minutes", seconds)
        time.sleep(seconds)


def scheduled() -> bool:
    """Whether a schedule started this flow run, not a person."""
    context = FlowRunContext.get()
    return context is not None and context.flow_run is not None and bool(context.flow_run.auto_scheduled)
