"""`python -m tasks.deploy POOL [all PROFILE ...]`: the pool; with `all` also the deployments, and the schedules of
nightly/PROFILE turned on. As often as you like: schedules keep the state that their owner gave them.
"""

import subprocess
import sys
from typing import Any
from uuid import UUID

from magellano.site import ROOT


def main(pool: str, everything: bool, nights: list[str]) -> None:
    """Prints a line for each thing done."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        _pool(client, pool)
        if not everything:
            return
        active = [(d.id, s.slug) for d in client.read_deployments() for s in d.schedules if s.active]
        print(f"{_deploy()} deployments")
        for deployment, slug in active:
            _turn_on(client, deployment, slug)
        for profile in nights:
            print(_night(client, profile))


def _pool(client: Any, name: str) -> None:
    """Make the pool through the API (`prefect work-pool create` would ask GitHub), or wake the one that is there."""
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectAlreadyExists
    from prefect.workers.process import ProcessWorker

    template = ProcessWorker.get_default_base_job_template()
    try:
        client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template))
        print(f"work pool {name}: made, one run at a time by each worker")
    except ObjectAlreadyExists:
        client.update_work_pool(name, WorkPoolUpdate(is_paused=False))  # `magellano down` may have paused it
        print(f"work pool {name}: is there")


def _deploy() -> int:
    """`prefect deploy --all`; how many deployments that were."""
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"prefect deploy --all: {' '.join((done.stdout + done.stderr).split())[-400:]}")
    return done.stdout.count("successfully created")


def _turn_on(client: Any, deployment: UUID, slug: str | None) -> None:
    """Deploying puts a schedule back to what prefect.yaml says; here it gets its owner's word again."""
    for schedule in client.read_deployment(deployment).schedules:
        if slug and schedule.slug == slug and not schedule.active:
            client.update_deployment_schedule(deployment, schedule.id, active=True)


def _night(client: Any, profile: str) -> str:
    from prefect.exceptions import ObjectNotFound

    try:
        deployment = client.read_deployment_by_name(f"nightly/{profile}")
    except ObjectNotFound:
        sys.exit(f"nightly/{profile}: no such deployment; add it to prefect.yaml")
    if not deployment.schedules:
        sys.exit(f"nightly/{profile}: it has no schedule; add `schedules: *nightly` to it in prefect.yaml")
    for schedule in deployment.schedules:
        client.update_deployment_schedule(deployment.id, schedule.id, active=True)
    cron = deployment.schedules[0].schedule
    return f"nightly/{profile}: on, {getattr(cron, 'cron', cron)} {getattr(cron, 'timezone', '')}".rstrip()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:3] == ["all"], sys.argv[3:])
