"""Reading safetensors files into MLX: the one place where that is done, and only after `headers` has checked them."""

from pathlib import Path

from magellano import headers
from magellano.backend import mx
from magellano.errors import InputError
from magellano.headers import Check


def load_file(path: Path, check: Check | None = None) -> dict[str, mx.array]:
    """The tensors of a file by name, lazy: evaluate them before the file's bytes can change.

    `check` sees the header before MLX does. MLX gets the file that was checked, not its name again. Raises InputError
    for a file that is missing, no regular file, or breaks a rule of `headers`.
    """
    with headers.checked(path, check) as (same, header):
        try:
            tensors = mx.load(same, format="safetensors")
        except (RuntimeError, ValueError) as e:
            raise InputError(f"{path}: MLX cannot read it ({e}); {headers.REMEDY}") from None
    assert isinstance(tensors, dict)
    assert {name: tuple(value.shape) for name, value in tensors.items()} == {n: e.shape for n, e in header.items()}
    return tensors
