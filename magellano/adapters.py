"""Several adapters over one base in memory, one of them on at a time: switching costs no reading, and each gives the
tokens that it gives alone.

    adapters = Adapters(load_model(base), base)
    adapters.add("legal", release)
    model = adapters.use("legal")       # and generate with it: magellano/generate.py
    model = adapters.use(None)          # the base alone

Between `use` and the next a model's decoder, stream and contexts are of the adapter that was on when they were made.
"""

from collections.abc import Mapping
from pathlib import Path

from magellano import durable, lora
from magellano.artifacts import MANIFEST
from magellano.backend import mx
from magellano.errors import InputError
from magellano.layout import ParamSpec, parameters
from magellano.model import MagellanoLM
from magellano.names import LoraKind
from magellano.profile import LoraConfig

Loaded = tuple[LoraConfig, dict[str, mx.array]]


class Adapters:
    """Adapters by name for `model`, which was read from the folder `base`."""

    def __init__(self, model: MagellanoLM, base: Path):
        self.model, self.base = model, base
        self._loaded: dict[str, Loaded] = {}
        lora.detach(model)

    @property
    def names(self) -> list[str]:
        return list(self._loaded)

    def add(self, name: str, folder: Path) -> None:
        """Read the release in `folder`. InputError where it is no adapter, or another base's."""
        self._new(name)
        base = lora.base_of(folder)
        if not base.is_dir():
            raise InputError(f"{folder}: its base {base} is not there; run the quantize stage again")
        if not same(base, self.base):
            raise InputError(
                f"{folder}: its base {base} is not {self.base}: the files differ; adapters that are loaded together "
                "need one base, so load it by itself"
            )
        self._loaded[name] = lora.load(folder, self.model.config)

    def blend(self, name: str, shares: Mapping[str, float]) -> None:
        """The weighted sum of the changes of adapters that are loaded, as one more. InputError for DoRA, whose change
        is no sum.
        """
        self._new(name)
        self._loaded[name] = blended(self.model, [(self._of(other), share) for other, share in shares.items()])

    def use(self, name: str | None) -> MagellanoLM:
        """The model with the adapter `name`, or without any."""
        if name is None:
            lora.detach(self.model)
        else:
            lora.attach(self.model, *self._of(name))
        return self.model

    def _of(self, name: str) -> Loaded:
        if name not in self._loaded:
            raise InputError(f"adapter {name}: not loaded; there is {', '.join(self.names) or 'none'}")
        return self._loaded[name]

    def _new(self, name: str) -> None:
        if name in self._loaded:
            raise InputError(f"adapter {name}: the name is taken; give another")


def same(one: Path, other: Path) -> bool:
    """Whether two base folders hold the same files, by their digests; a manifest is not compared."""
    return one.resolve() == other.resolve() or _digests(one) == _digests(other)


def _digests(folder: Path) -> dict[str, str]:
    files = (path for path in durable.files_of(folder) if path.name != MANIFEST)
    return {path.relative_to(folder).as_posix(): durable.sha256_file(path) for path in files}


def blended(model: MagellanoLM, parts: list[tuple[Loaded, float]]) -> Loaded:
    """The adapter whose s B A is the weighted sum of those of `parts`: their factors side by side."""
    if any(settings.kind is not LoraKind.LORA for (settings, _), _ in parts):
        raise InputError('an adapter of lora.kind "dora" cannot be blended: its rows have lengths; use it by itself')
    found: dict[str, list[tuple[mx.array, mx.array]]] = {}
    adapted = [spec for spec in parameters(model.config) if any(spec.target in s.targets for (s, _), _ in parts)]
    for spec in adapted:
        path = lora.module_path(spec)
        found[path] = [_weighed(spec, of, share) for of, share in parts if spec.target in of[0].targets]
    ranks = {spec.name: sum(a.shape[-2] for a, _ in found[lora.module_path(spec)]) for spec in adapted}
    settings = lora.settings_of(model.config, ranks)
    tensors = {}
    for spec in adapted:
        path = lora.module_path(spec)
        assert spec.target is not None
        scale = lora.scale(settings, spec.target, spec.layer)
        tensors[f"{path}.lora_a"] = mx.concatenate([a for a, _ in found[path]], axis=-2)
        tensors[f"{path}.lora_b"] = mx.concatenate([b for _, b in found[path]], axis=-1) / scale
    mx.eval(tensors)
    return settings, tensors


def _weighed(spec: ParamSpec, of: Loaded, share: float) -> tuple[mx.array, mx.array]:
    """A, and B with its scale and share in it."""
    (settings, tensors), path = of, lora.module_path(spec)
    assert spec.target is not None
    scale = share * lora.scale(settings, spec.target, spec.layer)
    return tensors[f"{path}.lora_a"], scale * tensors[f"{path}.lora_b"]
