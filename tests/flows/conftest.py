"""A Prefect server for all tests that want one, and a profile whose whole fine-tune, base included, takes a second."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.flows.site import POOL, Site, Up, wait
from tests.tiny import MODEL

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

TINY = (
    MODEL
    + """
[base]
source = "pretrain"

[data]
format = "completions"
files = ["builtin:python-docstrings"]
seq_len = 64
max_rows = 60
held_out = 0.2

[lora]
rank = 2

[train]
steps = 2
batch = 2
warmup = 1

[evaluate]
samples = 1
sample_tokens = 4
max_tokens = 256

[pretrain.data]
format = "text"
files = ["builtin:python-topics"]
seq_len = 64
max_rows = 40

[pretrain.train]
steps = 2
batch = 2
warmup = 1
"""
)


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """Path of the profile."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY, encoding="utf-8")
    return str(path)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty $MAGELLANO_HOME."""
    monkeypatch.setenv("MAGELLANO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="package")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site(tmp_path_factory.mktemp("site"))
    try:
        site.start("server", "start")
        wait("the server", site.healthy)
        yield site
    finally:
        site.stop()


@pytest.fixture(scope="package")
def client(site: Site) -> Iterator["SyncPrefectClient"]:
    from prefect.client.orchestration import get_client  # not above: what settles its environment comes first
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect.workers.process import ProcessWorker

    with temporary_settings({PREFECT_API_URL: site.url}), get_client(sync_client=True) as client:
        template = ProcessWorker.get_default_base_job_template()
        client.create_work_pool(WorkPoolCreate(name=POOL, type="process", base_job_template=template))
        site.prefect("deploy", "--all")
        yield client


@pytest.fixture(scope="package")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    """A site that `magellano up` has started; `magellano down` ends it."""
    up = Up(tmp_path_factory.mktemp("up"))
    try:
        up.magellano("up")
        yield up
    finally:
        up.magellano("down")
        assert not (up.home / "site" / "profiles.toml").exists(), "nobody is sent to a server that is gone"


@pytest.fixture
def api(up: Up) -> Iterator["SyncPrefectClient"]:
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: up.url}), get_client(sync_client=True) as client:
        yield client
