"""A file of torch.save, read into MLX: the one place that reads a pickle, and only as tensors, by torch's reader that
runs nothing of it. Needs torch, of the extra `exchange`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magellano import files
from magellano.backend import mx
from magellano.errors import InputError


class TorchFile:
    """The tensors of a state dict by name, alone in the file or under "model" in it. They stay on the disk until they
    are taken.
    """

    def __init__(self, path: Path, remedy: str):
        """Raises InputError where torch is not installed, or the file holds anything but tensors by name."""
        self.path, self.remedy = path, remedy
        try:
            import torch
        except ModuleNotFoundError:
            how = "make peers, or pip install -r requirements-peers.lock"
            raise InputError(f"{path}: only torch reads it, which is not installed: {how}") from None
        self._torch = torch
        wrong = (torch.serialization.pickle.UnpicklingError, RuntimeError, ValueError, KeyError, EOFError, OSError)
        with files.opened(path, remedy) as fd:
            try:
                held = torch.load(files.by_descriptor(fd), map_location="cpu", weights_only=True, mmap=True)
            except wrong as e:
                reason = next(iter(str(e).strip().splitlines()), type(e).__name__)
                raise InputError(f"{path}: torch does not read it as tensors alone ({reason}); {remedy}") from None
        held = held.get("model", held) if isinstance(held, dict) else held
        if not isinstance(held, Mapping) or not all(isinstance(n, str) and self._plain(t) for n, t in held.items()):
            raise InputError(f"{path}: not a table from names to float tensors; {remedy}")
        self._held: dict[str, Any] = dict(held)

    def _plain(self, tensor: Any) -> bool:
        torch = self._torch
        floats = (torch.float32, torch.float16, torch.bfloat16)
        return type(tensor) is torch.Tensor and tensor.dtype in floats and tensor.layout is torch.strided

    def check(self, wanted: Mapping[str, tuple[int, ...]]) -> None:
        """InputError unless the file holds just these tensors in these shapes."""
        for name, shape in wanted.items():
            if name not in self._held:
                raise InputError(f"{self.path}: tensor {name} is missing; {self.remedy}")
            if (found := tuple(self._held[name].shape)) != shape:
                raise InputError(
                    f"{self.path}: tensor {name} has shape {found}, the config says {shape}; {self.remedy}"
                )
        for name in self._held:
            if name not in wanted:
                raise InputError(f"{self.path}: tensor {files.shown(name)} belongs to no parameter; {self.remedy}")

    def take(self, name: str) -> mx.array:
        """The tensor `name` in its own type, no longer held here."""
        tensor = self._held.pop(name).detach().contiguous()
        if tensor.dtype == self._torch.bfloat16:
            return mx.array(tensor.view(self._torch.int16).numpy()).view(mx.bfloat16)
        return mx.array(tensor.numpy())
