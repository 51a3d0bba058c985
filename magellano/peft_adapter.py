"""Adapters of Hugging Face's PEFT on Mamba, both ways, for the modules where its models and ours compute the same.

in_proj and x_proj agree. PEFT refuses out_proj on Mamba; transformers reads dt_proj's weight past its adapter, which
so does nothing there; an adapter on a tied head is not on the embedding there, as it is here; experts have no module.
"""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from magellano import files, lora
from magellano.backend import mx
from magellano.errors import InputError
from magellano.foreign import is_dense
from magellano.headers import Header
from magellano.layout import HEAD, ParamSpec, parameters
from magellano.loader import FLOATS
from magellano.names import LoraInit, LoraKind, LoraTarget
from magellano.profile import LoraConfig, ModelConfig
from magellano.tensors import load_file

REMEDY = "give the folder of a LoRA adapter that PEFT saved for a Mamba model"
WHY_NOT = {
    LoraTarget.OUT_PROJ: "PEFT refuses out_proj on Mamba",
    LoraTarget.DT_PROJ: "transformers reads dt_proj's weight past its adapter",
    LoraTarget.HEAD: "PEFT's adapter on a tied head leaves the embedding as it is",
    LoraTarget.W1: "transformers has no such experts",
    LoraTarget.W2: "transformers has no such experts",
}
# Settings of PEFT that change what an adapter computes, or the base, and that are not known here.
_UNKNOWN = (
    "lora_bias", "modules_to_save", "fan_in_fan_out", "layer_replication", "trainable_token_indices",
    "target_parameters", "use_qalora", "alora_invocation_tokens", "arrow_config", "use_bdlora", "velora_config",
    "monteclora_config",
)  # fmt: skip
_NAME = re.compile(r"base_model\.model\.([\w.]+)\.(lora_A\.weight|lora_B\.weight|lora_magnitude_vector)", re.ASCII)
_PARTS = {peft: part for part, peft in lora.PEFT.items()}
Parts = dict[str, mx.array]  # of a module's adapter, by our names
_PATTERN = re.compile(r"[\w.]+", re.ASCII)


def write(folder: Path, config: ModelConfig, settings: LoraConfig, tensors: dict[str, mx.array], base: str) -> None:
    """Write the adapter for PEFT into `folder`. `base`: where its base will be found. InputError where it has modules
    on which PEFT's models compute something else.
    """
    if wrong := [t for t in settings.targets if (t, config.tied) != (LoraTarget.HEAD, False) and t in WHY_NOT]:
        said = "; ".join(f"{target}: {WHY_NOT[target]}" for target in wrong)
        raise InputError(f"PEFT cannot run this adapter ({said}); merge it: magellano fuse RUN OUT")
    if settings.init is LoraInit.LOFTQ:
        raise InputError(
            'this adapter started as the error of its NF4 base (lora.init "loftq"), which the base in PEFT does not '
            "have; merge it: magellano fuse RUN OUT"
        )
    if not is_dense(config):
        raise InputError("transformers has no such model (Mamba with experts); export it to mlx-lm")
    lora.save(folder, config, settings, tensors, base)
    path = folder / lora.CONFIG
    description = json.loads(path.read_text(encoding="utf-8"))
    del description["magellano"]
    path.write_text(json.dumps(description, indent=2) + "\n", encoding="utf-8")


def read(folder: Path, config: ModelConfig, base: lora.Base | None = None) -> tuple[LoraConfig, dict[str, mx.array]]:
    """The adapter in `folder` for a model of shape `config`, as `lora.attach` takes it: each module with the rank of
    its tensors, or of rank 1 and zero where it has none; scales in B. DoRA needs the weights of the `base`. InputError
    where it has modules or settings that are not known here.
    """
    path = folder / lora.CONFIG
    description = files.read_json(path, REMEDY)
    scales = _Scales(path, description)
    modules = _modules(config)
    kind = LoraKind.DORA if description.get("use_dora") else LoraKind.LORA
    stored = load_file(folder / lora.WEIGHTS, lambda header: _check(folder / lora.WEIGHTS, header, modules, kind))
    mx.eval(stored)
    found: dict[str, Parts] = {}
    for name, value in stored.items():
        module, part = _parsed(name)
        found.setdefault(module, {})[part] = value.astype(mx.float32)
    ranks: dict[str, int] = {}  # by parameter
    for module, parts in list(found.items()):
        spec = modules[module]
        if spec.target is LoraTarget.DT_PROJ:
            if mx.any(parts["lora_b"] != 0).item():
                raise InputError(f"{folder / lora.WEIGHTS}: {module}: {WHY_NOT[LoraTarget.DT_PROJ]}; {REMEDY}")
            del found[module]
            continue
        ranks[spec.name] = parts["lora_a"].shape[0]
    if not ranks:
        raise InputError(f"{folder / lora.WEIGHTS}: nothing in it has an effect; {REMEDY}")
    settings = lora.settings_of(config, ranks, kind)
    return settings, _placed(config, settings, found, scales, base)


def _placed(
    config: ModelConfig, settings: LoraConfig, found: dict[str, Parts], scales: "_Scales", base: lora.Base | None
) -> dict[str, mx.array]:
    tensors = lora.start(config, settings, base)
    for spec in parameters(config):
        path = lora.module_path(spec)
        if spec.target not in settings.targets:
            continue
        if path not in found:
            tensors[f"{path}.lora_a"] = mx.zeros_like(tensors[f"{path}.lora_a"])
            continue
        rank = found[path]["lora_a"].shape[0]
        found[path]["lora_b"] = scales.of(path, rank) * rank / settings.alpha * found[path]["lora_b"]
        tensors |= {f"{path}.{part}": value for part, value in found[path].items()}
    mx.eval(tensors)
    return tensors


class _Scales:
    """s in W + s B A for each module, as PEFT's settings have it."""

    def __init__(self, path: Path, description: Mapping[str, Any]):
        """InputError for settings that are not known here."""
        if description.get("peft_type") != "LORA":
            raise InputError(f"{path}: peft_type {files.shown(description.get('peft_type'))} is not LORA; {REMEDY}")
        if wrong := [key for key in _UNKNOWN if description.get(key)]:
            raise InputError(f"{path}: {wrong[0]} is set, which is not known here; merge the adapter with PEFT first")
        if description.get("bias", "none") != "none":
            raise InputError(
                f"{path}: bias {files.shown(description['bias'])}: Mamba's projections have none; {REMEDY}"
            )
        if description.get("init_lora_weights", True) not in (True, False, "gaussian"):
            raise InputError(f"{path}: init_lora_weights changed the base; merge the adapter with PEFT first")
        self._alpha = self._number(path, "lora_alpha", description.get("lora_alpha"))
        self._root = description.get("use_rslora", False) is True
        self._patterns = {}
        for key, value in (description.get("alpha_pattern") or {}).items():
            if not _PATTERN.fullmatch(key):
                raise InputError(f"{path}: alpha_pattern {files.shown(key)} is no plain module name; {REMEDY}")
            self._patterns[key] = self._number(path, f"alpha_pattern.{key}", value)

    @staticmethod
    def _number(path: Path, key: str, value: Any) -> float:
        if type(value) not in (int, float) or not 0 < value < 1e6:
            raise InputError(f"{path}: {key} is {files.shown(value)}, not a number above 0; {REMEDY}")
        return float(value)

    def of(self, module: str, rank: int) -> float:
        matched = (a for key, a in self._patterns.items() if module == key or module.endswith(f".{key}"))
        alpha = next(matched, self._alpha)
        return alpha / math.sqrt(rank) if self._root else alpha / rank


def _modules(config: ModelConfig) -> dict[str, ParamSpec]:
    """The modules that may have an adapter, by PEFT's names."""
    known = {LoraTarget.IN_PROJ, LoraTarget.X_PROJ, LoraTarget.DT_PROJ}
    specs = [s for s in parameters(config) if s.target in known or s.name == HEAD]
    return {lora.module_path(spec): spec for spec in specs}


def _parsed(name: str) -> tuple[str, str]:
    """Module and part ("lora_a") of a tensor's name that `_check` has seen."""
    match = _NAME.fullmatch(name)
    assert match
    return match[1], _PARTS[match[2]]


def _check(path: Path, header: Header, modules: dict[str, ParamSpec], kind: LoraKind) -> None:
    """InputError unless `header` has an A and a B of one rank, and for DoRA the rows' lengths, for each of some of
    `modules`, and nothing else.
    """
    ranks: dict[str, dict[str, int]] = {}
    wanted = ["lora_a", "lora_b", *(["lora_m"] if kind is LoraKind.DORA else [])]
    for name, entry in header.items():
        match = _NAME.fullmatch(name)
        spec = modules.get(match[1]) if match else None
        if match is None or spec is None or _PARTS[match[2]] not in wanted:
            known = ", ".join(sorted({m.rsplit(".", 1)[-1] for m in modules}))
            raise InputError(f"{path}: tensor {files.shown(name)} is no adapter on {known} of this model; {REMEDY}")
        (out, inner), part = spec.shape, _PARTS[match[2]]
        shape = {"lora_a": (*entry.shape[:1], inner), "lora_b": (out, *entry.shape[1:2]), "lora_m": (out,)}[part]
        rank = 1 if part == "lora_m" else entry.shape[part == "lora_b"] if len(entry.shape) == 2 else 0
        if entry.shape != shape or entry.dtype not in FLOATS or not 1 <= rank <= lora.RANK:
            raise InputError(f"{path}: tensor {name} is {entry.dtype} {entry.shape}, which does not fit; {REMEDY}")
        ranks.setdefault(match[1], {})[part] = rank
    for module, found in ranks.items():
        if missing := [part for part in wanted if part not in found]:
            raise InputError(f"{path}: tensor {module}.{lora.PEFT[missing[0]]} is missing; {REMEDY}")
        if found["lora_a"] != found["lora_b"]:
            raise InputError(f"{path}: {module}: A and B have ranks {found['lora_a']} and {found['lora_b']}; {REMEDY}")
