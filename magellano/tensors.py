"""Reading safetensors files, checked before MLX reads them."""

from pathlib import Path

from safetensors import SafetensorError, safe_open

from magellano.backend import mx
from magellano.errors import InputError


def load_file(path: Path) -> dict[str, mx.array]:
    """The tensors of a file by name, lazy: evaluate them before the file can change.

    The `safetensors` package reads the header first, since MLX's own reader accepts overlapping tensors, holes and
    trailing bytes. Raises InputError for a file that is missing or that it refuses.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass
    except (OSError, SafetensorError) as e:
        raise InputError(f"{path}: not a readable safetensors file ({e}); build it again") from None
    tensors = mx.load(str(path))
    assert isinstance(tensors, dict)
    return tensors
