"""`magellano up` and `down`: what they start, how it is guarded, and that what runs is saved before it ends."""

import json
import os
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from uuid import UUID

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from magellano import site
from magellano.names import Stage
from tests.flows.site import ROOT, SHORT, Up, wait

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def answer(url: str, method: str = "GET", body: bytes | None = None, **headers: str) -> tuple[int, dict[str, str]]:
    """Status and headers of an answer."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, body, named, method=method), timeout=30) as found:
            return found.status, {k.lower(): v for k, v in found.headers.items()}
    except urllib.error.HTTPError as e:
        return e.code, {k.lower(): v for k, v in e.headers.items()}


def test_up_a_second_time_starts_nothing(up: Up) -> None:
    assert "started: nothing: all of it runs" in up.magellano("up")


def test_it_listens_on_loopback_alone(up: Up) -> None:
    port = int(up.env["PREFECT_SERVER_API_PORT"])
    bound = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if line.split()[3] == "0A"]
    assert f"0100007F:{port:04X}" in bound
    assert [b for b in bound if b.endswith(f":{port:04X}")] == [f"0100007F:{port:04X}"]


def test_no_other_page_drives_it_and_its_own_reaches_nothing_else(up: Up) -> None:
    flow = json.dumps({"name": "x"}).encode()
    assert answer(f"{up.url}/flows/", "POST", flow, content_type="application/json")[0] == 403, "no CSRF token"
    asks = {"Origin": "http://evil.example", "Access_Control_Request_Method": "POST"}
    assert answer(f"{up.url}/flows/", "OPTIONS", **asks)[0] == 400
    own = answer(f"{up.url}/flows/", "OPTIONS", **(asks | {"Origin": up.ui}))
    assert (own[0], own[1]["access-control-allow-origin"]) == (200, up.ui)
    status, headers = answer(up.ui)
    assert status == 200
    rules = dict(rule.strip().split(" ", 1) for rule in headers["content-security-policy"].split(";"))
    assert rules["default-src"] == "'self'"
    assert all(up.ui.removeprefix("http") in word for word in rules["connect-src"].split() if "//" in word)
    assert "http" not in rules["script-src"]


def test_commands_work_as_typed_where_the_server_is_up(up: Up, api: SyncPrefectClient) -> None:
    """No PREFECT_API_URL: `magellano` finds the server of its home."""
    up.magellano("train", "demo", *[f"--set={k}={v}" for k, v in SHORT.items()])
    run = next(r for r in api.read_flow_runs() if r.deployment_id is None)
    assert run.state
    assert run.state.is_completed()


def test_prefect_s_own_command_line_works_as_typed(up: Up, api: SyncPrefectClient, tmp_path: Path) -> None:
    """In the folder of prefect.toml and of the home, with nothing set."""
    shutil.copy(ROOT / "prefect.toml", tmp_path)
    (tmp_path / ".magellano").symlink_to(up.home)
    env = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")} | {"HOME": str(tmp_path)}
    later = ["deployment", "run", "train/production3b", "--start-in", "1 hour"]
    command = [sys.executable, "-m", "prefect", *later]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    (run,) = (r for r in api.read_flow_runs() if str(r.id) in done.stdout)
    assert run.parameters["profile"] == "production3b"
    api.delete_flow_run(run.id)


def test_a_run_whose_stages_are_all_there_asks_the_server_little(up: Up) -> None:
    """Seconds differ from machine to machine; calls do not. Two a stage: its state's events go another way."""
    script = [sys.executable, "benchmarks/cached_stages.py", "demo", *(f"{k}={v}" for k, v in SHORT.items())]
    done = subprocess.run(script, cwd=ROOT, env=up.env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["server"], facts["stages"], facts["built"]) == (up.url, 8, [])
    assert 8 < facts["calls"] <= 14 + 2 * facts["stages"], facts


def test_old_runs_pages_go_and_the_rest_stays(up: Up, api: SyncPrefectClient) -> None:
    while len(list((up.home / "runs").glob("[0-9]*/run.json"))) < 2:  # where this test runs alone
        up.magellano("train", "demo", *[f"--set={k}={v}" for k, v in SHORT.items()])
    records = sorted((up.home / "runs").glob("[0-9]*/run.json"), key=lambda p: int(p.parent.name))
    facts = [json.loads(p.read_text()) for p in records]
    train = [i for i, f in enumerate(facts) if f["flow"] == "train" and api.read_flow_run(UUID(f["flow_run"]))]
    for i in train:  # all of them long ago
        records[i].write_text(json.dumps(facts[i] | {"ended": "2020-01-01T00:00:00+00:00"}))
    old, last = [UUID(facts[i]["flow_run"]) for i in train[:-1]], UUID(facts[train[-1]]["flow_run"])
    assert old
    listed = json.loads(up.magellano("gc", "--keep", "1", "--json"))
    assert (listed["pages"], listed["removed"]) == (len(old), False)
    assert api.read_flow_run(old[0]).id == old[0], "only listed"
    pictures = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=old))
    assert api.read_artifacts(artifact_filter=pictures)
    assert json.loads(up.magellano("gc", "--keep", "1", "--yes", "--json"))["pages"] == len(old)
    assert api.read_artifacts(artifact_filter=pictures) == []
    for run in old:
        with pytest.raises(ObjectNotFound):
            api.read_flow_run(run)
    kept = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[last]))
    assert len(api.read_artifacts(artifact_filter=kept)) > 8
    assert all(p.exists() for p in records), "our own books stay"


def test_a_schedule_keeps_its_owner_s_word_over_an_up(up: Up, api: SyncPrefectClient) -> None:
    assert "nightly/demo: on, 30 2 * * * Europe/Rome" in up.magellano("up", "--nightly", "demo")
    up.magellano("up")
    assert [s.active for s in api.read_deployment_by_name("nightly/demo").schedules] == [True]
    other = api.read_deployment_by_name("nightly/production3b").schedules
    assert [s.active for s in other] == [False], "only what was asked for"
    assert "nightly/nope: no such deployment" in up.magellano("up", "--nightly", "nope", rc=2)


def test_down_saves_what_runs_and_up_goes_on(up: Up, api: SyncPrefectClient) -> None:
    deployment = api.read_deployment_by_name("stages/train")
    given = {"overrides": SHORT | {"train.steps": 90_000, "train.checkpoint_every": 90_000, "train.log_every": 1}}
    run = api.create_flow_run_from_deployment(deployment.id, parameters=given)
    work = up.home / "work" / Stage.TRAIN
    before = set(work.glob("*"))

    def training() -> list[Path]:
        return [f for f in work.glob("*") if f not in before and (f / "metrics.jsonl").exists()]

    (folder,) = wait("its training", training, 240)
    said = up.magellano("down", "--only", "worker")
    assert f"cancelled {api.read_flow_run(run.id).name}" in said
    assert "ended: worker" in said
    state = api.read_flow_run(run.id).state
    assert state
    assert state.name == "Cancelled"
    assert steps(folder) > 0, "saved where it stood"
    assert api.read_work_pool("gpu").is_paused
    assert "started: worker" in up.magellano("up")
    assert not api.read_work_pool("gpu").is_paused

    # What was cancelled stays so until its user wants it back, and then goes on from the step that it was saved at.
    saved = steps(folder)
    assert last(folder) == saved, "it ended within a step"
    assert api.read_flow_run(run.id).run_count == 1
    retry = [sys.executable, "-m", "prefect", "flow-run", "retry", str(run.id)]
    subprocess.run(retry, cwd=ROOT, env=up.env | {"PREFECT_API_URL": up.url}, check=True, timeout=120)
    wait("a step more", lambda: last(folder) > saved, 120)
    api.set_flow_run_state(run.id, Cancelling())
    wait("its end", lambda: (s := api.read_flow_run(run.id).state) and s.name == "Cancelled", 60)
    assert steps(folder) == last(folder) > saved
    logged = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines() if "lr" in line]
    assert logged == sorted(set(logged)), "no step twice"
    assert logged[0] == 1


def steps(folder: Path) -> int:
    """The last step that was saved."""
    return max(int(p.name.removeprefix("step-")) for p in folder.glob("step-*"))


def last(folder: Path) -> int:
    """The last step that was logged, where each is."""
    return max(json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines())


def test_a_stranger_s_server_is_not_taken_for_ours(up: Up, tmp_path: Path) -> None:
    other = Up(tmp_path)
    other.env["PREFECT_SERVER_API_PORT"] = up.env["PREFECT_SERVER_API_PORT"]
    assert "another home's server answers there" in other.magellano("up", rc=2)
    assert other.magellano("down") == "ended: nothing: nothing of it ran\n"


def test_a_part_that_was_killed_is_started_again(up: Up) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAGELLANO_HOME", up.env["MAGELLANO_HOME"])
        found = site.running(site.Part.WORKER)
        assert found
        os.kill(found["pid"], signal.SIGKILL)
        wait("its end", lambda: site.running(site.Part.WORKER) is None, 30)
    assert "started: worker" in up.magellano("up")
