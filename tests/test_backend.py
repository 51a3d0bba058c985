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
