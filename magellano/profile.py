"""A profile: one model and one run, read once from TOML into frozen typed data.

Strict: an unknown key, a wrong type or an impossible combination raises InputError with file, key and the nearest
valid name.
"""

import difflib
import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, get_origin

from pydantic import BaseModel, Field, ValidationError, model_validator

from magellano import objective
from magellano.data import rules
from magellano.errors import InputError
from magellano.lora_config import LoraConfig
from magellano.names import (
    BaseSource,
    Compute,
    DataFormat,
    DataRender,
    LoraTarget,
    LossKind,
    Recompute,
    StateDtype,
)
from magellano.operating import DiskConfig, LoggingConfig, NotifyConfig
from magellano.section import Fraction, NonNegative, Positive, Section
from magellano.shape import ModelConfig

PROFILES = Path(__file__).resolve().parent.parent / "profiles"


class BaseConfig(Section):
    """The base that is fine-tuned: initial weights from `seed`, trained here by [pretrain], or a model folder."""

    source: BaseSource = Field(default=BaseSource.SEEDED, strict=False)
    folder: str = ""
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _folder(self) -> "BaseConfig":
        if (self.source is BaseSource.FOLDER) != bool(self.folder):
            raise ValueError('source "folder" and the key folder belong together; set both or neither')
        return self


class DataSource(Section):
    """One of several data sets: [[data.sources]]."""

    name: Annotated[str, Field(min_length=1, max_length=60)]
    weight: Annotated[float, Field(gt=0.0, le=1e6)] = 1.0  # share of the rows of an epoch, against the other weights
    files: tuple[str, ...] = Field(default=(), strict=False)
    hub: str = ""
    split: str = "train"
    format: DataFormat | None = Field(default=None, strict=False)


class DataConfig(Section):
    """What to read, as what, and how to pack it. `files` takes paths, globs, folders and `builtin:NAME`."""

    format: DataFormat = Field(default=DataFormat.TEXT, strict=False)
    files: tuple[str, ...] = Field(default=(), strict=False)
    hub: str = ""  # a data set on the Hugging Face hub: the one case that uses the network
    split: str = "train"
    sources: tuple[DataSource, ...] = Field(default=(), strict=False)  # in place of files and hub
    template: str = ""  # a chat template of Jinja: a tokenizer_config.json, or a .jinja; "": ours (data/formats.py)
    render: DataRender = Field(default=DataRender.JSON, strict=False)
    seq_len: Positive = 512  # T
    held_out: Annotated[float, Field(gt=0.0, lt=0.5)] = 0.05
    deduplicate: bool = True
    max_rows: Annotated[int, Field(ge=0)] = 0  # of each source; 0: all
    seed: Annotated[int, Field(ge=0)] = 0

    @property
    def parts(self) -> tuple["DataConfig", ...]:
        """Each source on its own; without sources this alone."""
        own = [s.model_dump(exclude={"name", "weight"}) | {"format": s.format or self.format} for s in self.sources]
        return tuple(self.model_copy(update={**changes, "sources": ()}) for changes in own) or (self,)

    @property
    def pairs(self) -> bool:
        """Whether its documents are pairs of answers."""
        return self.parts[0].format is DataFormat.PREFERENCE

    @model_validator(mode="after")
    def _possible(self) -> "DataConfig":
        if fault := rules.fault(self):
            raise ValueError(fault)
        return self


class QuantizeConfig(Section):
    """NF4 with double quantisation (Dettmers et al. 2023, arXiv 2305.14314)."""

    embedding: bool = True  # quantise the tied embedding/head too


class LossConfig(Section):
    """What [train] and [pretrain.train] minimise: -log p(target), and where kind is "renyi" less beta times the Renyi
    entropy of order alpha of the predicted distribution, both in nats a target token: a penalty on overconfidence.
    Evaluation is plain cross-entropy whatever kind is.
    """

    kind: LossKind = Field(default=LossKind.CROSS_ENTROPY, strict=False)
    alpha: Annotated[float, Field(gt=0.0, le=4.0)] = 2.0  # 1: Shannon's entropy
    beta: NonNegative = 0.01

    @property
    def has_entropy(self) -> bool:
        """Whether alpha and beta have an effect."""
        return self.kind is LossKind.RENYI and self.beta > 0


class TrainConfig(objective.Objectives):
    """One training run. A step is `accumulate` micro-batches of `batch` sequences, weighted by their target tokens."""

    steps: Positive
    batch: Positive = 4
    accumulate: Positive = 1
    lr: Annotated[float, Field(gt=0)] = 2e-4
    warmup: Annotated[int, Field(ge=0)] = 10  # steps
    min_lr_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1  # the cosine ends at lr * this
    weight_decay: NonNegative = 0.0
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: Annotated[float, Field(gt=0)] = 1e-8
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    compute: Compute = Field(default=Compute.AUTO, strict=False)
    state: StateDtype = Field(default=StateDtype.FLOAT32, strict=False)
    recompute: Recompute = Field(default=Recompute.AUTO, strict=False)  # layers, in the backward pass: a third slower
    balance_loss: NonNegative = 0.01  # Switch's load balancing, where the router trains
    router_z_loss: NonNegative = 0.001
    loss_chunk: Positive = 512  # rows whose logits exist at once
    seed: Annotated[int, Field(ge=0)] = 0
    log_every: Positive = 10  # steps
    checkpoint_every: Positive = 100  # steps
    evaluate_every: Annotated[int, Field(ge=0)] = 0  # steps; 0: only at the end

    @model_validator(mode="after")
    def _warmup(self) -> "TrainConfig":
        if self.warmup > self.steps:
            raise ValueError(f"warmup {self.warmup} is more than steps {self.steps}; lower warmup")
        return self


class EvaluateConfig(Section):
    """Base against fine-tuned on the fixed held-out split."""

    batch: Positive = 8
    max_tokens: Annotated[int, Field(ge=0)] = 0  # of the held-out split; 0: all
    samples: Annotated[int, Field(ge=0)] = 3
    sample_tokens: Positive = 48
    temperature: NonNegative = 0.0  # 0: greedy


class MemoryConfig(Section):
    """What the run may use. 0: no limit but the machine's."""

    limit_gib: NonNegative = 0.0


class GateConfig(Section):
    """When a nightly run's adapter replaces the promoted one. Both, and the base, are measured on the fixed held-out
    set: the held-out split of the data from which the first adapter was promoted.
    """

    min_gain_percent: float = 0.0  # by which its loss must be below the promoted one's; -1: 1 % above will do
    max_accuracy_drop: NonNegative = 0.5  # points of token accuracy that it may lose against the promoted one
    min_gain_on_base_percent: float = 0.0  # by which its loss must be below the base's
    max_tokens: Annotated[int, Field(ge=0)] = 0  # of the fixed held-out set; 0: all


class PretrainConfig(Section):
    """Full-parameter training of a base, so that the adapter has something real to stand on."""

    data: DataConfig
    train: TrainConfig


class Profile(Section):
    """One model and one run. `name` is the file's stem; it is not part of any artifact's key."""

    name: str
    description: str = ""
    model: ModelConfig
    base: BaseConfig = BaseConfig()
    data: DataConfig
    quantize: QuantizeConfig = QuantizeConfig()
    lora: LoraConfig = LoraConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig
    evaluate: EvaluateConfig = EvaluateConfig()
    memory: MemoryConfig = MemoryConfig()
    gate: GateConfig = GateConfig()
    disk: DiskConfig = DiskConfig()
    notify: NotifyConfig = NotifyConfig()
    logging: LoggingConfig = LoggingConfig()
    pretrain: PretrainConfig | None = None

    @model_validator(mode="after")
    def _base(self) -> "Profile":
        if self.base.source is BaseSource.PRETRAIN and self.pretrain is None:
            raise ValueError('base.source is "pretrain" but there is no [pretrain] section; add one')
        return self

    @model_validator(mode="after")
    def _patterns(self) -> "Profile":
        if key := self.lora.without_effect(self.model.n_layers, self.model.kind):
            raise ValueError(
                f"lora.rank_pattern {key} matches no projection with an adapter: layers are 0 to "
                f"{self.model.n_layers - 1}, every {self.model.moe_every}th has w1 and w2, the others the rest"
            )
        return self

    @model_validator(mode="after")
    def _objective(self) -> "Profile":
        if fault := objective.fault(self):
            raise ValueError(fault)
        return self

    @model_validator(mode="after")
    def _head(self) -> "Profile":
        if self.model.tied:
            return self
        if LoraTarget.HEAD in self.lora.targets:
            raise ValueError('lora.targets has "head", which trains where model.tied is true alone; leave it out')
        if self.base.source is BaseSource.PRETRAIN:
            raise ValueError('a base with model.tied false cannot be trained here; set base.source to "folder"')
        return self


def names() -> list[str]:
    """The profiles that come with the project."""
    return sorted(p.stem for p in PROFILES.glob("*.toml"))


def load_profile(name_or_path: str | Path, overrides: dict[str, Any] | None = None) -> Profile:
    """Read `profiles/NAME.toml` or the file at a path. `overrides` maps dotted keys ("train.steps") to values.

    Raises InputError for a profile that is not there, is not TOML or breaks a rule of the sections above.
    """
    path = _find(name_or_path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: not valid TOML: {e}") from None
    for key in data:
        if key == "name":
            raise InputError(f"{path}: name: a profile's name is its file's name; remove the key")
    _check_tables(data, Profile, path.name)
    for key, value in (overrides or {}).items():
        _override(data, key, value)
    try:
        return Profile.model_validate({"name": path.stem, **data})
    except ValidationError as e:
        raise InputError(_explain(e, path, overrides or {})) from None


def parse_override(text: str) -> tuple[str, Any]:
    """`section.key=value` from a command line; the value is read as JSON, else taken as a string."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise InputError(f"--set {text}: not of the form section.key=value")
    try:
        return key.strip(), json.loads(value)
    except json.JSONDecodeError:
        return key.strip(), value


def _find(name_or_path: str | Path) -> Path:
    text = str(name_or_path)
    if "/" in text or text.endswith(".toml"):
        path = Path(text)
        if not path.is_file():
            raise InputError(
                f"{path}: no such profile file; give a path to a .toml file or one of {', '.join(names())}"
            )
        return path
    path = PROFILES / f"{text}.toml"
    if not path.is_file():
        raise InputError(f"unknown profile {text!r}{_nearest(text, names())}; the profiles are {', '.join(names())}")
    return path


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def _section(model: type[BaseModel], key: str) -> type[BaseModel] | None:
    """The section class under `key`, or None where the key holds a plain value."""
    annotation = model.model_fields[key].annotation
    if get_origin(annotation) is tuple:  # a list of sections is a value: pydantic checks its keys
        return None
    for kind in (annotation, *getattr(annotation, "__args__", ())):
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            return kind
    return None


def _check_tables(data: dict[str, Any], model: type[BaseModel], where: str) -> None:
    for key, value in data.items():
        if key in model.model_fields and (section := _section(model, key)) and isinstance(value, dict):
            _check_tables(value, section, f"{where}: [{key}]")
        elif key not in model.model_fields:
            raise InputError(f"{where}: {key}: unknown key{_nearest(key, list(model.model_fields))}")


def _override(data: dict[str, Any], dotted: str, value: Any) -> None:
    model: type[BaseModel] = Profile
    table, parts = data, dotted.split(".")
    for depth, part in enumerate(parts):
        if part not in model.model_fields or part == "name":
            known = [".".join([*parts[:depth], k]) for k in model.model_fields if k != "name"]
            raise InputError(f"override {dotted}: unknown key{_nearest(dotted, known + _dotted(Profile))}")
        section = _section(model, part)
        if depth == len(parts) - 1:
            if section is not None and not isinstance(value, dict):
                raise InputError(f"override {dotted}: is a section; give one of its keys, as {dotted}.KEY=VALUE")
            table[part] = value
        elif section is None:
            raise InputError(f"override {dotted}: {part} is a value, not a section")
        else:
            table, model = table.setdefault(part, {}), section


def _dotted(model: type[BaseModel], prefix: str = "") -> list[str]:
    keys = []
    for key in model.model_fields:
        section = _section(model, key)
        keys += _dotted(section, f"{prefix}{key}.") if section else [prefix + key]
    return keys


def _explain(error: ValidationError, path: Path, overrides: dict[str, Any]) -> str:
    """One line per broken rule: where it stands (the file or the override), which key, what is wrong."""
    lines = []
    for e in error.errors():
        key = ".".join(str(part) for part in e["loc"]) or "profile"
        where = "override" if any(key == o or key.startswith(o + ".") for o in overrides) else str(path)
        message = e["msg"].removeprefix("Value error, ")
        shown = f" (got {e['input']!r})" if not isinstance(e["input"], dict) else ""
        if e["type"] == "enum":
            message += _nearest(str(e["input"]), re.findall(r"'([^']*)'", e["ctx"]["expected"]))
        if e["type"] == "missing":
            message, shown = "this key is required; add it", ""
        lines.append(f"{where}: {key}: {message}{shown}")
    return "; ".join(lines)
