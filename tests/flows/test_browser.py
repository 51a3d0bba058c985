"""Chromium without a head drives the UI of a real server: form, progress, artifacts, retry, cancel; and it reaches
nothing outside. MAGELLANO_SCREENSHOTS=FOLDER keeps pictures of it (those in docs/ were made so).
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
)

from magellano.names import Stage
from tests.flows.browser import Browser, program
from tests.flows.site import SHORT, Up, wait

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(program() is None, reason="no chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as browser:
        yield browser


def keep(browser: Browser, name: str) -> None:
    if folder := os.environ.get("MAGELLANO_SCREENSHOTS"):
        browser.picture(Path(folder) / f"{name}.png")


def start(browser: Browser, up: Up, api: SyncPrefectClient, overrides: dict[str, Any], picture: str = "") -> UUID:
    """Start train/demo from its form with these overrides; the run, whose page is shown."""
    deployment = api.read_deployment_by_name("train/demo")
    browser.open(f"{up.ui}/deployments/deployment/{deployment.id}/run")
    browser.wait("stages to build again")
    before = {r.id for r in api.read_flow_runs()}
    browser.focus("[...document.querySelectorAll('textarea')].find(e => e.value.trim() === '{}')")
    browser.type(json.dumps(overrides, indent=1))
    if picture:
        keep(browser, picture)
    browser.click("Submit")
    (run,) = wait("the run", lambda: [r for r in api.read_flow_runs() if r.id not in before], 60)
    assert run.parameters == {"profile": "demo", "overrides": overrides, "rerun": []}
    browser.open(f"{up.ui}/runs/flow-run/{run.id}")
    return run.id


def tasks(api: SyncPrefectClient, run: UUID) -> dict[str, str]:
    of_run = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
    return {t.name: t.state.name for t in api.read_task_runs(flow_run_filter=of_run) if t.state}


def state(api: SyncPrefectClient, run: UUID) -> str:
    found = api.read_flow_run(run).state
    assert found
    return found.name


def shown(browser: Browser, name: str, seconds: float = 60) -> None:
    """Until the run's page shows this state."""
    badge = "(document.querySelector('.state-badge') || {innerText: ''}).innerText.trim()"
    wait(f"{name} on the page", lambda: browser.evaluate(badge) == name, seconds)


def confirm(browser: Browser) -> None:
    """Say yes to the question that the UI asks in a dialog."""
    browser.click(None, ".p-modal__footer button:not(.p-modal__close-button)")


def test_the_deployments_are_seen(browser: Browser, up: Up) -> None:
    browser.open(f"{up.ui}/deployments")
    text = browser.wait("At 02:30 AM every day")
    assert "16 Deployments" in text
    keep(browser, "deployments")


def test_a_run_from_the_form_is_watched_to_its_end_and_its_artifacts_are_opened(
    browser: Browser, up: Up, api: SyncPrefectClient
) -> None:
    run = start(browser, up, api, SHORT | {"train.steps": 3}, "form")
    browser.wait("#1", 120)  # the run's name once it lives
    shown(browser, "Completed", 300)
    keep(browser, "run")
    assert set(tasks(api, run).values()) == {"Completed"}
    of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run]))
    artifacts = {str(a.key): a for a in api.read_artifacts(artifact_filter=of_run, limit=200)}
    wanted = {f"{stage}-facts".replace("_", "-") for stage in Stage}
    wanted |= {"train-progress", "evaluate-report", "run-report"}
    assert wanted <= artifacts.keys()
    for key, artifact in artifacts.items():
        browser.open(f"{up.ui}/artifacts/artifact/{artifact.id}")
        part = {
            "run-report": "What was made from what",
            "train-facts": "target_tokens",
            "evaluate-report": "perplexity",
        }
        browser.wait(part.get(key, key))
        if key == "run-report":
            assert int(browser.evaluate(WHOLE_PICTURES)) >= 2, "its pictures are drawn"
            keep(browser, key)
        if key == "evaluate-report":
            browser.evaluate("[...document.querySelectorAll('img')][0].scrollIntoView()")
            keep(browser, key)
    browser.open(f"{up.ui}/runs/flow-run/{run}?tab=Task%20Runs")
    browser.wait("attach_lora")


WHOLE_PICTURES = """
new Promise(done => setTimeout(() => done(
  [...document.querySelectorAll('img')].filter(e => e.complete && e.naturalWidth > 100).length), 2000))
"""


def test_a_failed_run_is_retried_from_its_finished_stages(browser: Browser, up: Up, api: SyncPrefectClient) -> None:
    shelf, aside = up.home / "artifacts" / Stage.EVALUATE, up.home / "aside"
    if shelf.exists():
        shelf.rename(aside)
    shelf.parent.mkdir(parents=True, exist_ok=True)
    shelf.write_text("in the way")
    run = start(browser, up, api, SHORT | {"train.steps": 4})
    wait("its end", lambda: state(api, run) == "Failed", 300)
    shown(browser, "Failed")
    keep(browser, "failed")
    shelf.unlink()
    if aside.exists():
        aside.rename(shelf)
    browser.click("Retry", "button")
    confirm(browser)
    wait("its second end", lambda: state(api, run) == "Completed", 300)
    assert api.read_flow_run(run).run_count == 2
    of_run = FlowRunFilter(id=FlowRunFilterId(any_=[run]))
    found = [(t.name, t.state.name) for t in api.read_task_runs(flow_run_filter=of_run) if t.state]
    assert ("evaluate", "Completed") in found, "beside the one that failed"
    trained = list((up.home / "artifacts" / Stage.TRAIN).glob("*/manifest.json"))
    assert sum(json.loads(m.read_text())["config"]["train"]["steps"] == 4 for m in trained) == 1, "not trained again"
    shown(browser, "Completed")


def test_a_run_is_cancelled_and_its_training_is_saved(browser: Browser, up: Up, api: SyncPrefectClient) -> None:
    run = start(browser, up, api, SHORT | {"train.steps": 100_000, "train.checkpoint_every": 100_000})
    work = up.home / "work" / Stage.TRAIN
    wait("its training", lambda: list(work.glob("*/metrics.jsonl")), 240)
    shown(browser, "Running")
    keep(browser, "running")
    browser.click("Cancel", "button")
    confirm(browser)
    wait("its end", lambda: state(api, run) == "Cancelled", 120)
    shown(browser, "Cancelled")
    keep(browser, "cancelled")
    steps = [int(p.name.removeprefix("step-")) for p in work.glob("*/step-*")]
    assert max(steps) > 0, "it was saved where it stood"


def test_the_pages_asked_nobody_else(browser: Browser, up: Up) -> None:
    """The run of this module, and the newer UI, whose telemetry no setting turns off: the policy refuses it."""
    browser.open(f"{up.ui}/v2/dashboard")
    browser.wait("Dashboard")
    outside = {urlsplit(u).hostname for u in browser.asked if u.startswith("http")} - {"127.0.0.1"}
    assert all(any(host in told for told in browser.refused) for host in outside if host), (outside, browser.refused)
