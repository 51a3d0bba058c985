"""Runs an operation's tests in every dialect: plain MLX, the host's kernels, the GPU's geometry on fibers, GPUs."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from magellano.ops import launch
from magellano.ops.launch import Dialect


def _enter(name: str, stack: ExitStack) -> None:
    wanted = Dialect.HOST if name == "fibers" else Dialect(name)
    if wanted not in launch.available():
        pytest.skip(f"dialect {name} cannot run here")
    stack.enter_context(launch.on_fibers() if name == "fibers" else launch.use(wanted))
    stack.enter_context(launch.poisoned())


@pytest.fixture(params=["reference", "host", "fibers", "cuda", "metal"])
def dialect(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once per dialect, with poisoned outputs; those that cannot run here are skipped by name."""
    with ExitStack() as stack:
        _enter(request.param, stack)
        yield request.param


@pytest.fixture(params=["host", "fibers", "cuda", "metal"])
def kernel_dialect(request: pytest.FixtureRequest) -> Iterator[str]:
    """As `dialect`, without the reference."""
    with ExitStack() as stack:
        _enter(request.param, stack)
        yield request.param
