"""Tests keep artifacts, results and Prefect's database in a folder of their own, whatever the environment says."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

os.environ["MLX_ENABLE_TF32"] = "0"  # float32 tests mean float32: MLX on CUDA multiplies in TF32 unless told

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background, which children inherit

_HOME = tempfile.mkdtemp(prefix="magellano-tests-")
os.environ["MAGELLANO_HOME"] = _HOME  # before anything imports tasks, which settles Prefect's environment by it
for _name in [n for n in os.environ if n.startswith("PREFECT_")]:
    del os.environ[_name]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With several processes (`--dist loadgroup`) a file's tests share one, and so do those of one Prefect server."""
    folder = Path(__file__).parent
    for item in items:
        part = item.path.relative_to(folder)
        item.add_marker(pytest.mark.xdist_group("flows" if part.parts[0] == "flows" else str(part)))


def pytest_unconfigure() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)
