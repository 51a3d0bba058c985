"""Run by test_resume.py in a process of its own: trains in forks, kills them or signals them, starts them again, and
prints what came of it as JSON. This process itself computes nothing, so that its forks can.

A fork is killed after a random time or, every second time, at a random one of the operations that saves consist of, or
halfway through the writing of a file. A scenario's "poison" are steps whose loss is NaN whenever their batch is
trained; "scale" is the loss scale that float16 starts with.
"""

import ctypes
import json
import mmap
import os
import random
import shutil
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from magellano import durable, lora, state
from magellano import trainer as trainer_module
from magellano.backend import mx
from magellano.errors import Stopped
from magellano.profile import TrainConfig
from magellano.trainer import Backprop, Trainer, run_to_end
from tests.training import ADAPTERS, CONFIG, SMALL, adapter_trainer, make_tokens

ADAPTER = "adapter_model.safetensors"
MARKS = mmap.mmap(-1, 16)  # shared with the fork: operations of saves so far, whether in one, steps so far, ready


def marks() -> list[int]:
    return list(struct.unpack("4i", MARKS[:16]))


def mark(place: int, value: int) -> None:
    MARKS[4 * place : 4 * place + 4] = struct.pack("i", value)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def hook_saves(die_at: int | None, on_operation: Callable[[], None]) -> None:
    """Count what a save does one by one, and die before the one with the number `die_at`, or halfway through it."""

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **more: Any) -> Any:
            now = marks()
            if not now[1]:
                return call(*args, **more)
            on_operation()
            mark(0, now[0] + 1)
            if now[0] != die_at:
                return call(*args, **more)
            if call is write and die_at % 2:
                call(*args, **more)
                os.truncate(args[0], os.path.getsize(args[0]) // 2)
            die()

        return inner

    write, save = mx.save_safetensors, Trainer.save
    mx.save_safetensors = counted(write)
    for name in ("fsync", "rename", "chmod", "unlink", "rmdir"):
        setattr(os, name, counted(getattr(os, name)))
    shutil.rmtree = counted(shutil.rmtree)  # type: ignore[assignment]
    Path.write_text, Path.mkdir = counted(Path.write_text), counted(Path.mkdir)  # type: ignore[method-assign]

    def marked_save(self: Trainer, folder: Path) -> None:
        mark(1, 1)
        save(self, folder)
        mark(1, 0)

    Trainer.save = marked_save  # type: ignore[method-assign]


def poison(steps: list[int], trainer: Trainer) -> None:
    call = Backprop.__call__

    def poisoned(self: Backprop, *args: Any) -> Any:
        found = call(self, *args)
        if trainer.step + 1 in steps:
            found = type(found)(found.nll * float("nan"), found.routers, found.gradients, found.squares)
        return found

    Backprop.__call__ = poisoned  # type: ignore[method-assign]


def train(tokens: Path, work: Path, scenario: dict[str, Any]) -> int:
    """In a fork: train to the end; the adapter and the run's facts go into `work`. Returns the exit code."""
    trainer_module.SCALE_START = scenario.get("scale", trainer_module.SCALE_START)
    trainer = adapter_trainer(tokens, TrainConfig(**(CONFIG.model_dump() | scenario["config"])))
    poison(scenario.get("poison", []), trainer)

    def progress(done: int, total: int, **facts: float | str) -> None:
        mark(2, marks()[2] + 1)

    mark(3, 1)
    try:
        facts = run_to_end(trainer, work, progress)
    except Stopped as e:
        return int(e.exit_code)
    lora.save(work, SMALL, ADAPTERS, trainer.tensors())
    (work / "facts.json").write_text(json.dumps(facts))
    return 0


def fork(work: Path, scenario: dict[str, Any], tokens: Path, prepare: Callable[[], None] = lambda: None) -> int:
    return fork_for(lambda: train(tokens, work, scenario), prepare)


def fork_for(task: Callable[[], int], prepare: Callable[[], None] = lambda: None) -> int:
    MARKS[:16] = bytes(16)
    if pid := os.fork():
        return pid
    code = 1
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # a fork dies with this process
        prepare()
        code = task()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def ended(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def unsound(work: Path) -> list[str]:
    found = {p.name: durable.damage(p, state.SEAL) for p in state.by_step(work)}
    return [f"{name}: {why}" for name, why in found.items() if why]


def outcome(work: Path) -> dict[str, Any]:
    facts = json.loads((work / "facts.json").read_text())
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    kept = ("step", "loss", "grad_norm", "lr", "tokens", "skipped", "held_out_loss", "rollback")
    return {
        "adapter": durable.sha256_file(work / ADAPTER),
        "rollbacks": facts["rollbacks"],
        "skipped": facts["skipped"],
        "metrics": sorted(json.dumps({k: line[k] for k in kept if k in line}, sort_keys=True) for line in lines),
        "left": sorted(p.name for p in work.iterdir() if p.name.startswith(".")),
    }


def killed(work: Path, scenario: dict[str, Any], tokens: Path, rng: random.Random, whole: tuple[float, int]) -> Any:
    """Kill a training `kills` times on its way, then let it end."""
    seconds, operations = whole
    landed, in_save, odd = 0, 0, []
    while landed < scenario["kills"]:
        by_operation = landed % 2 == 0
        die_at = rng.randrange(operations // 2) if by_operation else None
        pid = fork(work, scenario, tokens, lambda at=die_at: hook_saves(at, lambda: None))
        if not by_operation:
            while not marks()[3]:
                time.sleep(0.001)
            time.sleep(rng.uniform(0.0, seconds))
            os.kill(pid, signal.SIGKILL)
        status = ended(pid)
        odd += unsound(work)
        if status == 0:  # it ended before the kill: a new training
            shutil.rmtree(work)
        elif status == -signal.SIGKILL:
            landed, in_save = landed + 1, in_save + marks()[1]
        else:
            return {"failed": status}
    if status := ended(fork(work, scenario, tokens)):
        return {"failed": status}
    return {"kills": landed, "in_save": in_save, "unsound": odd, **outcome(work)}


def stopped(work: Path, scenario: dict[str, Any], tokens: Path, rng: random.Random) -> Any:
    """Stop a training by SIGTERM or SIGINT, twice each time, the second one in the save or as soon as can be."""
    codes, seconds = [], []
    for number in range(scenario["stops"]):
        first, second = rng.sample([signal.SIGTERM, signal.SIGINT], 2)

        def prepare(second: int = second) -> None:
            hook_saves(None, lambda: os.kill(os.getpid(), second))  # at every operation of every save

        pid = fork(work, scenario, tokens, prepare if number % 2 else lambda: hook_saves(None, lambda: None))
        while not marks()[2] and os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            time.sleep(0.001)
        now = time.monotonic()
        os.kill(pid, first)
        os.kill(pid, second)
        codes.append(ended(pid))
        seconds.append(time.monotonic() - now)
        if codes[-1] == 0:
            shutil.rmtree(work)
    if status := ended(fork(work, scenario, tokens)):
        return {"failed": status}
    return {"codes": codes, "seconds": max(seconds, default=0.0), "unsound": unsound(work), **outcome(work)}


def save_three(folder: Path, only_last: bool = False) -> int:
    """Checkpoints of steps 1, 2 and 3, the last one marked as a trainer's is."""
    for step in (3,) if only_last else (1, 2, 3):
        mark(1, step == 3)
        tensors = {"a": mx.full((500,), step)}
        state.save(folder, step, tensors, tensors, {})
    return 0


def died_at_every_operation(folder: Path) -> list[dict[str, Any]]:
    """Of a save that died at its first, second, ... operation: what stands there, what the next start takes, and what
    is left once it has saved again.
    """
    told = []
    while True:
        work, number = folder / str(len(told)), len(told)
        status = ended(fork_for(lambda w=work: save_three(w), lambda n=number: hook_saves(n, lambda: None)))
        if status == 0:
            return told
        assert status == -signal.SIGKILL
        odd = unsound(work)

        def start(work: Path = work) -> int:
            state.remove_leftovers(work)
            found = state.latest(work)
            assert found is not None
            assert found.parameters["a"].tolist() == [found.step] * 500
            return found.step

        took = ended(fork_for(start))
        assert ended(fork_for(lambda w=work: save_three(w, only_last=True))) == 0
        told.append({"unsound": odd, "took": took, "left": sorted(p.name for p in work.iterdir())})


def main() -> None:
    folder, scenarios = Path(sys.argv[1]), json.load(sys.stdin)
    tokens, found = make_tokens(folder / "tokens"), {}
    for name, scenario in scenarios.items():
        rng, work = random.Random(scenario.get("seed", name)), folder / name
        work.mkdir()
        for _ in range(2):  # the first one compiles
            shutil.rmtree(work / "whole", ignore_errors=True)
            pid = fork(work / "whole", scenario, tokens, lambda: hook_saves(None, lambda: None))
            while not marks()[3]:
                time.sleep(0.001)
            started = time.monotonic()
            assert ended(pid) == 0
            seconds = time.monotonic() - started
        found[name] = {"whole": outcome(work / "whole"), "seconds": seconds, "operations": marks()[0]}
        if "kills" in scenario:
            found[name]["killed"] = killed(work / "killed", scenario, tokens, rng, (seconds, marks()[0]))
        if "stops" in scenario:
            found[name]["stopped"] = stopped(work / "stopped", scenario, tokens, rng)
    found["every operation"] = died_at_every_operation(folder)
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
