"""The stages of one run, each carried out when something first asks for it."""

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any

from prefect.runtime import flow_run

from flows import names
from magellano import gate as gates
from magellano import gc, ledger, lineage, nightly, notify, pipeline, tensorboard
from magellano.artifacts import ArtifactRef
from magellano.errors import InputError
from magellano.names import BaseSource, Decision, RunState, Stage
from magellano.profile import Profile, load_profile
from tasks import presence, publish, stage, terminal
from tasks.attach_lora import attach_lora
from tasks.checkpoint import checkpoint
from tasks.evaluate import evaluate
from tasks.gate import gate
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
    """Properties are the stages' artifacts; reading one carries out what it needs, once. A context: a run's record in
    the ledger is open while it lasts.

    `rerun`: these stages and all that build on them are built again, even where a result would turn out the same.
    """

    def __init__(self, profile: str, overrides: dict[str, Any], rerun: Iterable[Stage] = ()) -> None:
        terminal.show_logs()
        presence.announce()
        self.profile: Profile = load_profile(profile, overrides)
        tensorboard.check(self.profile)
        self._asked = {"profile": profile, "overrides": overrides, "rerun": [str(stage) for stage in rerun]}
        self._again = pipeline.with_dependents(rerun)
        self._done: list[Done] = []

    def __enter__(self) -> "Chain":
        self.run = ledger.Run(flow_run.flow_name, self.profile, str(flow_run.id), self._asked)
        self.run.__enter__()
        names.number(self.run.record.number)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run.__exit__(kind, error, trace)
        record = self.run.record
        told = str(record.gate["reason"]) if record.gate else record.why
        notify.tell(
            self.profile.notify, notify.event(record.state, record.gate), record.number, self.profile.name, told
        )
        if error is None and self.profile.disk.budget_gib:
            self._fit()

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

    def news(self) -> nightly.News:
        """What is new since the last judged run, and whether it may be judged at all."""
        gates.check(self.profile)
        news = nightly.look(self.profile)
        self.run.say(data=news.files, why=news.text)
        log.info("%s", news.text)
        return news

    def nothing_new(self, news: nightly.News) -> dict[str, Any]:
        """The result of a run that had nothing to train on."""
        log.info("no training: %s", news.text)
        self.run.say(state=RunState.NOTHING_NEW)
        return {**self.result(), "nothing_new": news.text}

    def judge(self, news: nightly.News) -> str:
        """Let the gate decide on the release; the decision."""
        release, evaluation = self.release, self.evaluation
        found: dict[str, Any] = gate(self.profile, release, evaluation, news, self.run.record.number)
        self.run.say(gate=found)
        tell = log.warning if found["decision"] == Decision.KEPT_ASIDE else log.info
        tell("%s %s: %s", release.key[:8], found["decision"], found["reason"])
        return str(found["decision"])

    def result(self) -> dict[str, Any]:
        """What the flow returns, as JSON: each stage with its state, reference, folder and summary; the measures."""
        store = stage.open_store()
        stages = [
            {
                "stage": done.name, "state": "reused" if done.reused else "built", "seconds": round(done.seconds, 3),
                **done.ref.model_dump(mode="json", exclude={"stage"}),
                "path": str(store.path(done.ref)), "summary": store.manifest(done.ref)["summary"],
                "made_from": [f"{ref.stage}/{ref.key}" for ref in lineage.inputs(store, done.ref).values()],
            }
            for done in self._done
        ]  # fmt: skip
        evaluation = next((s["summary"] for s in stages if s["stage"] == Stage.EVALUATE), None)
        self.run.say(numbers=ledger.numbers({s["stage"]: s["summary"] for s in stages}))
        reused = sum(done.reused for done in self._done)
        if stages and reused == len(stages):
            log.info("nothing has changed: all %d stages were reused, nothing was rebuilt", reused)
        elif stages:
            log.info("%d of %d stages were reused, %d built", reused, len(stages), len(stages) - reused)
        result = {
            "profile": self.profile.name, "run": self.run.record.number, "home": str(store.home), "stages": stages,
            "evaluation": evaluation, "gate": self.run.record.gate, "took": self.run.took(),
        }  # fmt: skip
        if stages:
            publish.run_report(result)
        return result

    def _run(self, task: Any, *args: Any, name: str = "", again: bool | None = None) -> ArtifactRef:
        stage_ = Stage(task.name)
        again = stage_ in self._again if again is None else again
        name, started = name or stage_.value, time.monotonic()
        named = task.with_options(task_run_name=name)
        state = named(*args, rerun=str(flow_run.id) if again else "", return_state=True)
        ref: ArtifactRef = state.result()
        done = Done(name, ref, state.name == stage.CACHED, time.monotonic() - started)
        self._done.append(done)
        self.run.stage(name, ref, done.reused, round(done.seconds, 3))
        return ref

    def _fit(self) -> None:
        """Hold the disk budget. A run that goes on beside this one puts it off."""
        limit = int(self.profile.disk.budget_gib * (1 << 30))
        try:
            found = gc.to_budget(limit)
        except InputError as e:
            log.warning("disk.budget_gib is not looked after now: %s", e)
            return
        for path in found["removed"]:
            log.info("disk.budget_gib: removed %s", path)
        if found["bytes"] > limit:
            log.warning(
                "%s takes %.2f GiB, more than disk.budget_gib %g, and nothing more may go; raise it, or remove by hand",
                stage.open_store().home, found["bytes"] / (1 << 30), self.profile.disk.budget_gib,
            )  # fmt: skip
