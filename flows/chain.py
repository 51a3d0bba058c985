"""The stages of one run, each carried out when something first asks for it."""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from prefect.runtime import flow_run

from magellano import pipeline
from magellano.artifacts import ArtifactRef
from magellano.errors import InputError
from magellano.names import BaseSource, Stage
from magellano.profile import Profile, load_profile
from tasks import presence, stage, terminal
from tasks.attach_lora import attach_lora
from tasks.checkpoint import checkpoint
from tasks.evaluate import evaluate
from tasks.pretrain import pretrain
from tasks.quantize import quantize
from tasks.tokenize import tokenize
from tasks.train import train

log = logging.getLogger("magellano.flows")


@dataclass(frozen=True)
class Done:
    """One stage of this run."""

    name: str
    ref: ArtifactRef
    reused: bool
    seconds: float


class Chain:
    """Properties are the stages' artifacts; reading one carries out what it needs, once.

    `rerun`: these stages and all that build on them are built again, even where a result would turn out the same.
    """

    def __init__(self, profile: str, overrides: dict[str, Any], rerun: Iterable[Stage] = ()) -> None:
        terminal.show_logs()
        presence.announce()
        self.profile: Profile = load_profile(profile, overrides)
        self._again = pipeline.with_dependents(rerun)
        self._done: list[Done] = []

    @cached_property
    def tokens(self) -> ArtifactRef:
        return self._run(tokenize, self.profile, self.profile.data)

    @cached_property
    def pretrained(self) -> ArtifactRef:
        if self.profile.pretrain is None:
            raise InputError(
                f"profile {self.profile.name}: no [pretrain] section, so there is no base to train; add one"
            )
        # Its own data under the stage's name: a rerun of `tokenize` means the fine-tune's data.
        tokens = self._run(
            tokenize, self.profile, self.profile.pretrain.data, name="tokenize for pretrain", again=False
        )
        return self._run(pretrain, self.profile, tokens)

    @cached_property
    def base(self) -> ArtifactRef:
        source = self.pretrained if self.profile.base.source is BaseSource.PRETRAIN else None
        return self._run(quantize, self.profile, source)

    @cached_property
    def adapter(self) -> ArtifactRef:
        return self._run(attach_lora, self.profile, self.base)

    @cached_property
    def trained(self) -> ArtifactRef:
        return self._run(train, self.profile, self.tokens, self.base, self.adapter)

    @cached_property
    def release(self) -> ArtifactRef:
        return self._run(checkpoint, self.profile, self.trained, self.base, self.tokens)

    @cached_property
    def evaluation(self) -> ArtifactRef:
        return self._run(evaluate, self.profile, self.release, self.tokens, self.base)

    def reach(self, last: Stage) -> None:
        """Carry out `last` and what it builds on."""
        match last:
            case Stage.TOKENIZE:
                self.tokens  # noqa: B018 (reading it is what carries it out)
            case Stage.PRETRAIN:
                self.pretrained  # noqa: B018
            case Stage.QUANTIZE:
                self.base  # noqa: B018
            case Stage.ATTACH_LORA:
                self.adapter  # noqa: B018
            case Stage.TRAIN:
                self.trained  # noqa: B018
            case Stage.CHECKPOINT:
                self.release  # noqa: B018
            case Stage.EVALUATE:
                self.evaluation  # noqa: B018

    def result(self) -> dict[str, Any]:
        """What the flow returns, as JSON: each stage with its state, reference, folder and summary; the measures."""
        store = stage.open_store()
        stages = [
            {
                "stage": done.name, "state": "reused" if done.reused else "built", "seconds": round(done.seconds, 3),
                **done.ref.model_dump(mode="json", exclude={"stage"}),
                "path": str(store.path(done.ref)), "summary": store.manifest(done.ref)["summary"],
            }
            for done in self._done
        ]  # fmt: skip
        evaluation = next((s["summary"] for s in stages if s["stage"] == Stage.EVALUATE), None)
        reused = sum(done.reused for done in self._done)
        if reused == len(stages):
            log.info("nothing has changed: all %d stages were reused, nothing was rebuilt", reused)
        else:
            log.info("%d of %d stages were reused, %d built", reused, len(stages), len(stages) - reused)
        return {"profile": self.profile.name, "home": str(store.home), "stages": stages, "evaluation": evaluation}

    def _run(self, task: Any, *args: Any, name: str = "", again: bool | None = None) -> ArtifactRef:
        stage_ = Stage(task.name)
        again = stage_ in self._again if again is None else again
        name, started = name or stage_.value, time.monotonic()
        named = task.with_options(task_run_name=name)
        state = named(*args, rerun=str(flow_run.id) if again else "", return_state=True)
        ref: ArtifactRef = state.result()
        self._done.append(Done(name, ref, state.name == stage.CACHED, time.monotonic() - started))
        return ref
