"""Tests keep artifacts, results and Prefect's database in a folder of their own, whatever the environment says."""

import os
import shutil
import signal
import tempfile
from typing import Any

import pytest

os.environ["MLX_ENABLE_TF32"] = "0"  # float32 tests mean float32: MLX on CUDA multiplies in TF32 unless told

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background, which children inherit

_HOME = tempfile.mkdtemp(prefix="magellano-tests-")
os.environ["MAGELLANO_HOME"] = _HOME  # before anything imports tasks, which settles Prefect's environment by it
for _name in [n for n in os.environ if n.startswith("PREFECT_")]:
    del os.environ[_name]


@pytest.hookimpl(optionalhook=True)  # pytest-xdist's, with `-n`
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests share a process, and so do those of one Prefect server; files go out in their order."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::", 1)[0]
            return "tests/flows" if file.startswith("tests/flows/") else file

    return Files(config, log)


def pytest_unconfigure() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)
