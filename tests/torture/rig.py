"""The whole pipeline on a tiny profile, without Prefect, in a fork: import once, start in 10 ms, kill at will.

The parent must never evaluate an array: MLX's threads do not survive a fork. What a child does it marks in shared
memory, which outlives its kill.
"""

import mmap
import os
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.backends.backend_agg  # imported here once, as pandera: every fork would pay for it
import matplotlib.figure  # noqa: F401
import pandera.pandas  # noqa: F401

from magellano import artifacts, durable, pipeline, state
from magellano.artifacts import ArtifactRef, Inputs, Store
from magellano.data import readers
from magellano.names import Stage
from magellano.profile import DataConfig, Profile, load_profile
from magellano.progress import silent
from magellano.stages import attach_lora, checkpoint, evaluate, pretrain, quantize, tokenize, train
from magellano.tokenizer import Tokenizer
from magellano.trainer import Trainer
from tests.tiny import MODEL

ADAPTER = "adapter_model.safetensors"
STEPS = 6
TINY = (
    MODEL
    + f"""[base]
source = "pretrain"
[data]
format = "completions"
files = ["pairs.jsonl"]
seq_len = 64
held_out = 0.2
[lora]
rank = 2
[train]
steps = {STEPS}
batch = 2
accumulate = 2
warmup = 1
lr = 1e-2
checkpoint_every = 1
log_every = 1
[evaluate]
samples = 1
sample_tokens = 2
max_tokens = 64
[pretrain.data]
format = "text"
files = ["lines.jsonl"]
seq_len = 64
held_out = 0.2
[pretrain.train]
steps = {STEPS}
batch = 2
warmup = 1
checkpoint_every = 1
log_every = 1
"""
)
TRAINING = (Stage.PRETRAIN, Stage.TRAIN)
ORDER = list(Stage)


def write_profile(folder: Path) -> Path:
    """tiny.toml with its data, in `folder`."""
    pairs = "".join(f'{{"prompt": "name{n} -> ", "completion": "the number {n * n}"}}\n' for n in range(40))
    texts = "".join(f'{{"text": "line {n} says {n * 7} and then {n * 13}"}}\n' for n in range(60))
    (folder / "pairs.jsonl").write_text(pairs)
    (folder / "lines.jsonl").write_text(texts)
    path = folder / "tiny.toml"
    path.write_text(TINY.replace('["', f'["{folder}/'))
    return path


class Marks:
    """What a child was doing, readable after its death: stage, what it writes, steps saved and resumed, words."""

    SIZE, WORDS = 1 << 16, 64

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, self.SIZE)
        self.clear()

    def clear(self) -> None:
        self._memory[: self.WORDS + 4] = bytes(self.WORDS + 4)
        for slot in range(1, 8):
            self._put(slot, -1)

    def _put(self, slot: int, value: int) -> None:
        struct.pack_into("<i", self._memory, 4 * slot, value)

    def _get(self, slot: int) -> int:
        return int(struct.unpack_from("<i", self._memory, 4 * slot)[0])

    stage = property(lambda self: self._get(1), lambda self, value: self._put(1, value))
    writing = property(lambda self: self._get(0), lambda self, value: self._put(0, value))  # 1 checkpoint, 2 artifact

    def saved(self, stage: Stage) -> int:
        return self._get(2 + TRAINING.index(stage))

    def resumed(self, stage: Stage) -> int:
        return self._get(4 + TRAINING.index(stage))

    def note(self, kind: str, step: int) -> None:
        stage = ORDER[self.stage]
        if stage in TRAINING:
            self._put({"saved": 2, "resumed": 4}[kind] + TRAINING.index(stage), step)

    @property
    def words(self) -> str:
        size = self._get(self.WORDS // 4)
        return bytes(self._memory[self.WORDS + 4 : self.WORDS + 4 + size]).decode("utf-8", "replace")

    @words.setter
    def words(self, text: str) -> None:
        data = text.encode("utf-8", "replace")[: self.SIZE - self.WORDS - 4]
        self._memory[self.WORDS + 4 : self.WORDS + 4 + len(data)] = data
        self._put(self.WORDS // 4, len(data))


def watch(marks: Marks) -> None:
    """In a child: mark what is being written and how far the training is."""
    save, resume, seal, publish = Trainer.save, Trainer.resume, durable.seal, durable.publish

    def marked(call: Callable[..., Any], what: int) -> Callable[..., Any]:
        def inner(*args: Any, **rest: Any) -> Any:
            before, marks.writing = marks.writing, marks.writing or what
            try:
                return call(*args, **rest)
            finally:
                marks.writing = before

        return inner

    def marked_save(self: Trainer, *args: Any, **rest: Any) -> Any:
        done = marked(save, 1)(self, *args, **rest)
        marks.note("saved", self.step)
        return done

    def marked_resume(self: Trainer, *args: Any, **rest: Any) -> Any:
        done = resume(self, *args, **rest)
        marks.note("resumed", self.step)
        return done

    Trainer.save, Trainer.resume = marked_save, marked_resume  # type: ignore[method-assign]
    durable.seal, durable.publish = marked(seal, 2), marked(publish, 2)


@dataclass
class Chain:
    """The stages in their order, by the keys that the flow's tasks give them."""

    home: Path
    profile: Profile
    marks: Marks

    last: Stage = Stage.EVALUATE

    def run(self) -> str:
        """Build what is not there, up to `last` (CHECKPOINT or EVALUATE); returns the released adapter's SHA-256."""
        p, store = self.profile, Store(self.home)
        assert p.pretrain is not None
        tokens = self._tokens(p.data)
        base_tokens = self._tokens(p.pretrain.data)
        dense = self._build(
            Stage.PRETRAIN, {"tokens": base_tokens},
            lambda out, work: pretrain.run(out, p, store.path(base_tokens), work(), silent),
        )  # fmt: skip
        base = self._build(
            Stage.QUANTIZE, {"base": dense}, lambda out, work: quantize.run(out, p, store.path(dense), silent)
        )
        adapter = self._build(
            Stage.ATTACH_LORA, {"base": base}, lambda out, work: attach_lora.run(out, p, store.path(base))
        )
        folders = [store.path(ref) for ref in (tokens, base, adapter)]
        trained = self._build(
            Stage.TRAIN, {"tokens": tokens, "base": base, "adapter": adapter},
            lambda out, work: train.run(out, p, *folders, work(), silent),
        )  # fmt: skip
        inputs = {"trained": trained, "base": base, "tokens": tokens}
        lineage = {name: ref.model_dump(mode="json") for name, ref in inputs.items()}
        parts = [store.path(ref) for ref in inputs.values()]
        release = self._build(
            Stage.CHECKPOINT, {**inputs, "base folder": base.key},
            lambda out, work: checkpoint.run(out, p, *parts, lineage),
        )  # fmt: skip
        if self.last is Stage.EVALUATE:
            self._evaluate(release, tokens, base)
        return durable.sha256_file(store.path(release) / ADAPTER)

    def _evaluate(self, release: ArtifactRef, tokens: ArtifactRef, base: ArtifactRef) -> None:
        p, store = self.profile, Store(self.home)
        self._build(
            Stage.EVALUATE, {"release": release, "tokens": tokens, "base": base},
            lambda out, work: evaluate.run(out, p, store.path(release), store.path(tokens), store.path(base), silent),
        )  # fmt: skip

    def _tokens(self, data: DataConfig) -> ArtifactRef:
        vocabulary = self.profile.model.vocab_size
        return self._build(
            Stage.TOKENIZE, {"data": readers.digest(data)},
            lambda out, work: tokenize.run(out, data, vocabulary, silent), data,
        )  # fmt: skip

    def _build(self, stage: Stage, inputs: Inputs, make: Any, data: DataConfig | None = None) -> ArtifactRef:
        self.marks.stage = ORDER.index(stage)
        store, version = Store(self.home), pipeline.STAGES[stage].version
        config = pipeline.settings(stage, self.profile, data)
        key = artifacts.stage_key(stage, version, config, inputs)
        return store.build(
            stage, key, version=version, inputs=inputs, config=config,
            make=lambda out: make(out, lambda: store.work(stage, key)),
        ).ref  # fmt: skip


def fork(work: Callable[[], str], marks: Marks, before: Callable[[], object] | None = None) -> int:
    """A child that does `work` and leaves its answer, or its exception's traceback, as its last words. Its exit status:
    0 done, 1 an exception.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if pid := os.fork():
        return pid
    status = 1
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        if before:
            before()
        marks.words = work()
        status = 0
    except BaseException as e:
        marks.words = f"{type(e).__name__}: {e}\n{traceback.format_exc()}"
    finally:
        os._exit(status)


def wait(pid: int, seconds: float = 60.0) -> int | None:
    """The exit status (negative: the signal) of a child; None where it had to be killed after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return None
        time.sleep(0.0005)


@dataclass
class Reference:
    """The tiny profile, the released adapter's SHA-256 after a run that nothing disturbs, seconds of each stage."""

    profile: Profile
    digest: str
    took: dict[Stage, float]


def uninterrupted(folder: Path, marks: Marks) -> Reference:
    """The reference, run twice into folder/whole: the first run compiles and warms caches."""
    profile, took = load_profile(write_profile(folder)), dict.fromkeys(ORDER, 0.0)
    Tokenizer(profile.model.vocab_size).encode("tables")
    for _ in range(2):
        shutil.rmtree(folder / "whole", ignore_errors=True)
        took = dict.fromkeys(ORDER, 0.0)
        marks.clear()
        pid = fork(Chain(folder / "whole", profile, marks).run, marks)
        now = time.monotonic()
        while not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.001)
            before, now = now, time.monotonic()
            if marks.stage >= 0:
                took[ORDER[marks.stage]] += now - before
        assert wait(pid) == 0, marks.words
    return Reference(profile, marks.words, took)


def unsound(home: Path) -> list[str]:
    """What stands under a final name, of artifacts and of checkpoints, and is not whole."""
    found = []
    for folder in [*home.glob("artifacts/*/[!.]*"), *home.glob("work/*/[!.]*/step-*")]:
        seal = state.SEAL if folder.name.startswith("step-") else artifacts.MANIFEST
        if why := durable.damage(folder, seal):
            found.append(f"{folder.relative_to(home)}: {why}")
    return found


def leftovers(home: Path) -> list[str]:
    """Temporary and set-aside folders, and work of stages that are done."""
    odd = [*home.glob("artifacts/*/.*/*"), *home.glob("artifacts/*/.tmp-*"), *home.glob("work/*/*")]
    return [str(p.relative_to(home)) for p in odd]
