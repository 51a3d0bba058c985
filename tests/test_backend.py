"""The process is prepared before MLX is imported, and says what was chosen and why."""

import subprocess
import sys

import pytest

from magellano import backend
from magellano.backend import mx


def test_what_was_chosen_is_said() -> None:
    facts = backend.describe()
    assert facts["backend"] in ("cpu", "cuda", "metal")
    assert facts["why"]
    assert all(isinstance(value, str) for value in facts.values())


@pytest.mark.skipif(sys.platform != "linux" or backend.on_gpu(), reason="a BLAS is put in front on Linux CPUs alone")
def test_importing_mlx_first_is_warned_of() -> None:
    code = "import warnings; warnings.simplefilter('error'); import mlx.core; import magellano.backend"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "mlx was imported before magellano" in done.stderr


def test_compute_dtypes() -> None:
    assert backend.compute_dtype("float16") == mx.float16
    assert backend.compute_dtype("auto") == (mx.bfloat16 if backend.on_gpu() else mx.float32)
    with pytest.raises(ValueError, match="float8"):
        backend.compute_dtype("float8")


def test_memory_is_held_within_and_given_back_after():
    def limits() -> tuple[int, int]:
        found = mx.set_memory_limit(1 << 30), mx.set_cache_limit(1 << 30)
        mx.set_memory_limit(found[0])
        mx.set_cache_limit(found[1])
        return found

    before = limits()
    with backend.hold_memory(123 << 20) as held:
        assert limits() == (held, held) == (123 << 20, 123 << 20)
    assert limits() == before
    with pytest.raises(RuntimeError), backend.hold_memory(123 << 20):
        raise RuntimeError
    assert limits() == before


def test_more_than_the_device_has_is_not_asked_for():
    available = backend.device_memory()
    assert available is not None
    with backend.hold_memory(2 * available) as held:
        assert 0.9 * available < held < available
