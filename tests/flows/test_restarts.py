"""A run whose process is killed, with its worker or without, runs again by itself, three times, from what is done."""

import os
import signal
import time
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

from magellano.names import Stage
from tests.flows.site import SHORT, Up, wait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ENDLESS = SHORT | {"train.steps": 90_000, "train.checkpoint_every": 100, "train.lr": 1e-5}
BEFORE = {"tokenize", "tokenize for pretrain", "pretrain", "quantize", "attach_lora"}
PROMISED_S = 120.0


def processes(word: bytes, where: str) -> list[int]:
    """Those with this in their command line or environment."""
    found = []
    for path in Path("/proc").glob(f"[0-9]*/{where}"):
        try:
            if word in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def flow_process(up: Up, run: UUID) -> int:
    """The process of the flow run that says so itself."""
    record = up.home / "runs" / f"{run}.json"
    (process,) = [p for p in processes(f"PREFECT__FLOW_RUN_ID={run}".encode(), "environ") if record.is_file()
                  and f'"pid": {p},' in record.read_text()]  # fmt: skip
    return process


def worker(up: Up) -> int | None:
    """The worker's process, not the one that keeps it."""
    ours = processes(f"MAGELLANO_HOME={up.home}\0".encode(), "environ")
    return next((p for p in processes(b"\0prefect\0worker\0start\0", "cmdline") if p in ours), None)


def steps(up: Up) -> int:
    """The last step that was saved."""
    saved = (up.home / "work" / Stage.TRAIN).glob("*/step-*")
    return max((int(p.name.removeprefix("step-")) for p in saved), default=0)


def trains(up: Up, api: SyncPrefectClient, run: UUID, attempt: int) -> None:
    """Wait until this attempt of the run has saved a step."""

    def begun() -> bool:
        flow_run = api.read_flow_run(run)
        return flow_run.run_count == attempt and flow_run.state is not None and flow_run.state.name == "Running"

    wait(f"attempt {attempt}", begun, PROMISED_S)
    goes_on(up)


def goes_on(up: Up) -> None:
    step = steps(up)
    wait("a step", lambda: steps(up) > step, 60)


def built(api: SyncPrefectClient, run: UUID) -> dict[str, int]:
    """How often each stage was built in the run's attempts; one that was reused every time counts 0."""
    found = api.read_task_runs(flow_run_filter=FlowRunFilter(id=FlowRunFilterId(any_=[run])), limit=200)
    states = [(t.name, t.state.name) for t in found if t.state]
    return {name: states.count((name, "Completed")) for name in {name for name, _ in states}}


def test_a_killed_run_runs_again_three_times_and_then_stays_crashed(up: Up, api: SyncPrefectClient) -> None:
    train = api.read_deployment_by_name("stages/train")
    given = {"overrides": ENDLESS}
    run = api.create_flow_run_from_deployment(train.id, parameters=given, tags=["mine", "restart 1 of 3"]).id
    trains(up, api, run, 1)
    first = built(api, run)
    assert set(first) == BEFORE | {"train"}

    # The power goes: run and worker at once.
    flow, former = flow_process(up, run), worker(up)
    assert former
    os.kill(former, signal.SIGKILL)
    os.kill(flow, signal.SIGKILL)
    trains(up, api, run, 2)
    assert api.read_flow_run(run).tags == ["mine", "restart 2 of 3"]
    assert built(api, run) == first, "no finished stage again"

    # The worker alone: the run lives on, says so, and is left alone. Then the run, which the new worker does not know.
    flow, former = flow_process(up, run), worker(up)
    assert former
    os.kill(former, signal.SIGKILL)
    wait("another worker", lambda: worker(up) not in (None, former), 60)
    log = up.home / "site" / "worker.log"
    told = log.read_text().count("/90000  ETA")
    wait("a line of the run", lambda: log.read_text().count("/90000  ETA") > told, 60)
    goes_on(up)
    assert flow_process(up, run) == flow
    assert api.read_flow_run(run).run_count == 2
    os.kill(flow, signal.SIGKILL)
    trains(up, api, run, 3)
    assert built(api, run) == first

    # The run alone, once too often.
    os.kill(flow_process(up, run), signal.SIGKILL)
    wait("its end", lambda: "not again" in ended(api, run)[1], 60)
    time.sleep(2)  # two more looks
    state, message = ended(api, run)
    assert (state, api.read_flow_run(run).run_count) == ("Crashed", 3)
    assert api.read_flow_run(run).tags == ["mine", "restart 3 of 3"]
    assert message.endswith("it was started again 3 times, so not again: Retry goes on from what is finished")


def ended(api: SyncPrefectClient, run: UUID) -> tuple[str, str]:
    """Name and message of its state."""
    found = api.read_flow_run(run).state
    assert found
    return found.name, str(found.message)
