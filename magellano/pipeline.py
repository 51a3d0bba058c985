"""What each stage depends on, once: its version, its part of the profile, and the stages that it builds on.

A stage's version is raised when its output changes for the same settings and inputs: that makes old artifacts stale.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from magellano import durable
from magellano.artifacts import content_digest, stage_key
from magellano.errors import InputError
from magellano.lora_config import LoraConfig
from magellano.names import BaseSource, DataRender, Objective, Stage
from magellano.objective import KEYS
from magellano.profile import DataConfig, Profile, TrainConfig
from magellano.tokenizer import FILE, Tokenizer, ours


@dataclass(frozen=True)
class Spec:
    """`needs`: the stages whose artifacts it reads. The data that a base is pretrained on is tokenised on its own."""

    version: int
    needs: tuple[Stage, ...] = ()


STAGES: dict[Stage, Spec] = {
    Stage.TOKENIZE: Spec(version=1),
    Stage.PRETRAIN: Spec(version=1),
    Stage.QUANTIZE: Spec(version=1, needs=(Stage.PRETRAIN,)),
    Stage.ATTACH_LORA: Spec(version=1, needs=(Stage.QUANTIZE,)),
    Stage.TRAIN: Spec(version=1, needs=(Stage.TOKENIZE, Stage.QUANTIZE, Stage.ATTACH_LORA)),
    Stage.CHECKPOINT: Spec(version=1, needs=(Stage.TOKENIZE, Stage.QUANTIZE, Stage.TRAIN)),
    Stage.EVALUATE: Spec(version=2, needs=(Stage.TOKENIZE, Stage.QUANTIZE, Stage.CHECKPOINT)),
}


def settings(stage: Stage, profile: Profile, data: DataConfig | None = None) -> dict[str, Any]:
    """The settings that `stage`'s output depends on; other changes reuse the artifact. `data`: what is tokenised.

    Where data or a base folder lie is left out: their content's digest is an input.
    """
    match stage:
        case Stage.TOKENIZE:
            assert data is not None
            where = {"files", "hub"}
            how = data.model_dump(mode="json", exclude={*where, "template", "sources", "render"})
            if data.render is not DataRender.JSON:
                how["render"] = str(data.render)
            if data.template:
                how["template"] = "kept"  # its text is an input; tokens of before it was kept are made again
            if data.sources:
                how["sources"] = [source.model_dump(mode="json", exclude=where) for source in data.sources]
            facts = {"data": how, "vocab_size": profile.model.vocab_size}
            return facts if (digest := _foreign(profile)) is None else facts | {"tokenizer": digest}
        case Stage.PRETRAIN:
            assert profile.pretrain is not None
            trained = {"model": profile.model, "seed": profile.base.seed, "train": _train(profile.pretrain.train)}
            return trained | _loss(profile)
        case Stage.QUANTIZE:
            seeded = profile.base.source is BaseSource.SEEDED
            return {"model": profile.model, "quantize": profile.quantize, "seed": profile.base.seed if seeded else None}
        case Stage.ATTACH_LORA:
            return {"lora": _adapter(profile.lora)}
        case Stage.TRAIN:
            plus = profile.lora.plus
            return {"train": _train(profile.train)} | _loss(profile) | ({} if plus == 1.0 else {"lora.plus": plus})
        case Stage.CHECKPOINT:
            return {"profile": profile.name}
        case Stage.EVALUATE:
            return {"evaluate": profile.evaluate, "profile": profile.name}


def fingerprint(profile: Profile, data: str, pretrain_data: str | None, base: str | None) -> str:
    """What a fine-tune of `profile` would be made of: every stage's version and settings up to the release, and the
    digests of its data, of what its base is pretrained on, and of its base's folder. Equal ones make equal releases.
    """
    made = [Stage.TOKENIZE, Stage.QUANTIZE, Stage.ATTACH_LORA, Stage.TRAIN, Stage.CHECKPOINT]
    config = {str(stage): [STAGES[stage].version, settings(stage, profile, profile.data)] for stage in made}
    inputs = {"data": data}
    if pretrain_data is not None:
        assert profile.pretrain is not None
        config["pretrain"] = [STAGES[Stage.PRETRAIN].version, settings(Stage.PRETRAIN, profile)]
        config["pretrain data"] = [settings(Stage.TOKENIZE, profile, profile.pretrain.data)]
        inputs["pretrain data"] = pretrain_data
    if base is not None:
        inputs["base"] = base
    return stage_key(Stage.CHECKPOINT, 0, config, inputs)


def _loss(profile: Profile) -> dict[str, Any]:
    """[loss] where it differs from plain cross-entropy, for which its other keys mean nothing."""
    return {"loss": profile.loss} if profile.loss.has_entropy else {}


def _adapter(lora: LoraConfig) -> dict[str, Any]:
    """What the starting adapter depends on; keys that came later stand in it where they are set."""
    made, default = lora.model_dump(mode="json", exclude={"plus"}), LoraConfig().model_dump(mode="json")
    later = {"kind", "rslora", "rank_pattern", "init"}
    return {key: value for key, value in made.items() if key not in later or value != default[key]}


def _train(train: TrainConfig) -> dict[str, Any]:
    """[train], what is minimised where it is not the usual."""
    return train.model_dump(mode="json", exclude=set(KEYS) if train.objective is Objective.SFT else set())


def with_dependents(stages: Iterable[Stage]) -> frozenset[Stage]:
    """The stages and every stage that builds on one of them, directly or not."""
    found = set(stages)
    for stage, spec in STAGES.items():  # in their order, so that one pass reaches all
        if found.intersection(spec.needs):
            found.add(stage)
    return frozenset(found)


def base_folder(profile: Profile) -> Path:
    """The model folder that base.folder names. InputError where it is not there."""
    folder = Path(profile.base.folder).expanduser()
    if not (folder / "config.json").is_file():
        raise InputError(f"base.folder {folder}: no model folder (no config.json in it); give the folder of a model")
    return folder


def tokenizer(profile: Profile) -> Tokenizer:
    """That of the base folder, if base.folder names one with an imported tokenizer; else GPT-2's."""
    return Tokenizer(profile.model.vocab_size) if _foreign(profile) is None else Tokenizer.load(base_folder(profile))


def _foreign(profile: Profile) -> str | None:
    """The digest of an imported tokenizer, with which all tokens change."""
    if profile.base.source is not BaseSource.FOLDER or ours(folder := base_folder(profile)):
        return None
    return durable.sha256_file(folder / FILE)


def base_digest(profile: Profile) -> str:
    """The content of the folder that base.folder names."""
    folder = base_folder(profile)
    return content_digest(
        {p.relative_to(folder).as_posix(): {"sha256": durable.sha256_file(p)} for p in durable.files_of(folder)}
    )
