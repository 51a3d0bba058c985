"""One training loop for a full base and for an adapter: what differs is which parameters are trainable.

A step is `accumulate` micro-batches; every target token of the step weighs the same, however tokens fall into
micro-batches. What a step does depends on (settings, step number) and the parameters alone, so that a resumed run
repeats it to the bit.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from magellano import activations, disk, dpo, durable, experts, state
from magellano.backend import compute_dtype, mx, tree_flatten, tree_unflatten
from magellano.backprop import Backprop, Batch
from magellano.data import shards
from magellano.errors import Diverged, InputError, Stopped
from magellano.guard import Guard, NotFinite, Trouble, all_finite
from magellano.layout import parameters
from magellano.metrics import Metrics, MetricsFile, Mirror, PairMetrics
from magellano.model import MagellanoLM
from magellano.names import METRICS, Compute
from magellano.ops.cross_entropy import Renyi
from magellano.optimizer import AdamW, cosine_with_warmup, global_norm, gradient_factor
from magellano.profile import LossConfig, TrainConfig
from magellano.progress import Progress
from magellano.signals import StopRequest

log = logging.getLogger(__name__)

GIB = float(1 << 30)
_ROOMS = "rooms"  # of a checkpoint's facts
SCALE_START, SCALE_MAX, SCALE_GROWTH_STEPS = 2.0**15, 2.0**24, 2000  # dynamic loss scaling (Micikevicius et al. 2018)


@dataclass
class LossScale:
    """Factor on the loss so that float16 gradients do not underflow; halved on overflow, doubled in good times."""

    value: float = 1.0
    good: int = 0
    dynamic: bool = False

    def update(self, finite: bool) -> None:
        if not self.dynamic:
            return
        self.good = self.good + 1 if finite else 0
        if not finite:
            self.value = max(1.0, self.value / 2)
        elif self.good == SCALE_GROWTH_STEPS:
            self.value, self.good = min(SCALE_MAX, self.value * 2), 0


class Trainer:
    """Trains what is trainable in `model` on the split `train` of a tokens folder, by default for cross-entropy."""

    def __init__(
        self,
        model: MagellanoLM,
        config: TrainConfig,
        tokens: Path,
        loss: LossConfig | None = None,
        limit_gib: float = 0.0,
        plus: float = 1.0,
    ):
        """`limit_gib`: as the profile's [memory]; 0: none. `plus`: as its [lora]."""
        self.model, self.config = model, config
        self.train, self.held_out = shards.Shards(tokens, "train"), shards.Shards(tokens, "held_out")
        self.dpo = dpo.Dpo.of(config)
        if bool(self.dpo) != bool(self.train.facts.get("pairs")):
            raise InputError(f"{tokens}: train.objective {config.objective} is not for these tokens; tokenize again")
        model.compute = compute_dtype(config.compute)
        model.chunk = config.loss_chunk
        model.keep_small_dense()
        self.routers = any(name.endswith("router.weight") for name in dict(tree_flatten(model.trainable_parameters())))
        decays = {spec.name for spec in parameters(model.config) if spec.decays}
        self.optimizer = AdamW(
            config.lr, (config.beta1, config.beta2), config.eps, config.weight_decay, config.state, config.seed,
            decays=lambda name: name in decays or name.endswith((".lora_a", ".lora_b")),
            rates=lambda name: plus if name.endswith(".lora_b") else 1.0,
        )  # fmt: skip
        self.optimizer.init(model.trainable_parameters())
        float16 = config.compute is Compute.FLOAT16
        self.scale = LossScale(SCALE_START, dynamic=True) if float16 else LossScale()
        self.step, self.tokens, self.guard = 0, 0, Guard()
        self.trouble: Trouble | None = None  # what the last step gives reason to set the training back for
        self.measured: float | None = None  # the held-out loss of the state as it is
        self.preferred: dpo.Told | None = None  # what was measured with it, of pairs
        self._follow_schedule()
        self.backprop = Backprop(
            model, Renyi(loss.alpha, loss.beta) if loss and loss.has_entropy else None,
            keeps=not activations.recomputes(model, config, config.batch * self.train.seq_len, limit_gib),
        )  # fmt: skip

    def one_step(self) -> Metrics:
        """Take the next step and return its metrics; `trouble` says whether the training should be set back."""
        c, started = self.config, time.perf_counter()
        self.trouble, self.measured = None, None
        if self.step + 1 in self.guard.passed:
            return self._pass_over()
        batches = [self.train.batch(rows) for rows in self._rows(self.step + 1).reshape(c.accumulate, c.batch)]
        total = sum(float(b.weights.sum()) for b in batches)
        among = max(total if self.dpo is None else sum(map(dpo.count, batches)), 1.0)  # what the loss is a mean of
        grads: dict[str, mx.array] = {}
        nll, squares = mx.zeros(()), mx.zeros(())
        routers = (c.balance_loss / c.accumulate, c.router_z_loss / c.accumulate) if self.routers else None
        for rows in batches:
            batch = self._batch(rows)
            scaled = None if routers is None else (routers[0] * self.scale.value, routers[1] * self.scale.value)
            found = self.backprop(batch, self.scale.value / among, scaled)
            nll, squares = nll + found.nll, found.squares
            grads = _added(grads, found.gradients) if c.accumulate > 1 else found.gradients
            del found  # its gradients must not outlast the next pass
        norm = mx.sqrt(squares.sum()) if c.accumulate == 1 else global_norm(grads)
        # The update is on its way before the norm is known here; a factor that is not finite changes nothing.
        factor = gradient_factor(norm + (nll - nll).sum(), c.clip_norm, self.scale.value)
        self.optimizer.consume(self.model, grads, factor=factor)
        self.optimizer.evaluate(self.model.trainable_parameters(), norm, nll)
        loss, *more = (np.array(nll, dtype=np.float64).reshape(-1) / among).tolist()
        grad_norm = float(np.array(norm)) / self.scale.value
        finite, lr = bool(np.isfinite(grad_norm) and np.isfinite(loss)), self._rate(self.step)
        if not finite:
            self.optimizer.take_back()
        can_overflow = self.scale.dynamic and self.scale.value > 1.0
        self.scale.update(finite)
        self.step += 1
        self.trouble = self.guard.judge(self.step, loss if total and not more else None, finite, can_overflow)
        self.tokens += int(total)
        if not finite:
            self._follow_schedule()
        seconds = time.perf_counter() - started
        inputs = c.batch * c.accumulate * self.train.seq_len
        return (PairMetrics if more else Metrics)(
            self.step, loss, lr, grad_norm, self.tokens, inputs / seconds,
            mx.get_peak_memory() / GIB, seconds, not finite, *more,
        )  # fmt: skip

    def _batch(self, rows: shards.Batch) -> Batch:
        """The arrays of a micro-batch; of pairs with the reference's log-probabilities."""
        pairs = None if self.dpo is None else dpo.Pairs.of(self.dpo, self.model, rows)
        return Batch(mx.array(rows.tokens), mx.array(rows.targets), mx.array(rows.weights), mx.array(rows.reset), pairs)

    def _pass_over(self) -> Metrics:
        """The next step without its batch: nothing is trained."""
        lr = self._rate(self.step)
        self.step += 1
        self._follow_schedule()
        peak = mx.get_peak_memory() / GIB
        return Metrics(self.step, math.nan, lr, math.nan, self.tokens, 0.0, peak, 0.0, skipped=True)

    def _rate(self, step: int) -> float:
        """The learning rate of step `step`, from 0."""
        c = self.config
        return cosine_with_warmup(step, c.lr, c.warmup, c.steps, c.min_lr_ratio)

    def _follow_schedule(self) -> None:
        """Tell the optimiser the rates of the steps to come; it counts the steps that it took, which skipped ones are
        not.
        """
        skipped = self.step - int(np.array(self.optimizer.step))
        self.optimizer.learning_rate = lambda step: self._rate(step + skipped)

    def _rows(self, step: int) -> np.ndarray:
        """The row numbers of step `step`, from 1."""
        c, count = self.config, self.config.accumulate * self.config.batch
        return shards.indices((step - 1) * count, count, self.train.rows, c.seed)

    def held_out_loss(self, rows: int = 64, unless: Callable[[], bool] = lambda: False) -> float | None:
        """Nats a target token, or a pair, over the first `rows` held-out rows; training is left as it was. None where
        `unless`, which is asked before each batch, says to stop.
        """
        nll, total = 0.0, 0.0
        self.preferred = None
        sums = np.zeros(5)
        for first in range(0, min(rows, self.held_out.rows), self.config.batch):
            if unless():
                return None
            index = np.arange(first, min(first + self.config.batch, rows, self.held_out.rows))
            b = self.held_out.batch(index)
            if self.dpo is not None:
                found, pairs = dpo.held_out(self.dpo, self.model, b)
                sums, total = sums + found, total + pairs
                continue
            scores, _ = self.model.scores(
                mx.array(b.tokens), mx.array(b.targets), mx.array(b.reset), self.config.loss_chunk
            )
            nll += float((np.array(scores) * b.weights).sum())
            total += float(b.weights.sum())
        if self.dpo is not None:
            self.preferred = dpo.told(sums, int(total))
            return self.preferred.loss
        return nll / max(total, 1.0)

    def tensors(self) -> dict[str, mx.array]:
        """The trainable parameters by name."""
        return dict(tree_flatten(self.model.trainable_parameters()))

    def save(self, folder: Path) -> None:
        """Write the whole running state, sealed: parameters, optimiser, loss scale, position, the guard's memory.

        Raises NotFinite, and writes nothing, where a parameter or a state of the optimiser is not finite.
        """
        tensors, moments = self.tensors(), dict(tree_flatten(self.optimizer.state))
        if not all_finite([*tensors.values(), *moments.values()]):
            raise NotFinite(f"the state after step {self.step} is not finite")
        facts = {
            "tokens": self.tokens,
            "loss_scale": asdict(self.scale),
            "guard": asdict(self.guard),
            state.HELD_OUT: self.measured,
        } | ({_ROOMS: self.backprop.seen} if self.backprop.loads else {})  # a GPU's
        state.save(folder, self.step, tensors, moments, facts)

    def resume(self, folder: Path) -> bool:
        """Continue from the last verified checkpoint under `folder`, if there is one. InputError where it is another
        run's.
        """
        state.remove_leftovers(folder)
        found = state.latest(folder)
        if found is not None:
            self._restore(found, folder)
        return found is not None

    def roll_back(self, folder: Path, trouble: Trouble) -> None:
        """Go back to the last checkpoint under `folder` that the blamed batches have not touched, and pass them over
        from now on. Raises Diverged where there is none, or where that was done too often.
        """
        guard = self.guard
        step = guard.pass_over(trouble, lambda step: [int(row) for row in self._rows(step)])
        found = state.latest(folder, at_most=step)
        if found is None:
            raise Diverged(f"step {self.step}: {trouble.why}; there is no checkpoint up to step {step} to go back to")
        self._restore(found, folder)
        self.guard = replace(self.guard, passed=guard.passed, rollbacks=guard.rollbacks)
        state.forget_after(folder, self.step)

    def room(self, folder: Path) -> int:
        """Bytes that must be free under `folder` for the checkpoints to come: those that stay and one being written, as
        far as they are not there.
        """
        c, there = self.config, len(state.by_step(folder))
        every = min(c.checkpoint_every, c.evaluate_every or c.checkpoint_every)
        to_come = math.ceil((c.steps - self.step) / every) + (not there)
        most = state.KEPT + 1 + bool(c.evaluate_every)
        return min(to_come, max(1, most - there)) * state.size(self.tensors(), dict(tree_flatten(self.optimizer.state)))

    def _restore(self, found: state.Found, folder: Path) -> None:
        ours = self.tensors(), dict(tree_flatten(self.optimizer.state))
        for mine, theirs in zip(ours, (found.parameters, found.optimizer), strict=True):
            if _kinds(mine) != _kinds(theirs):
                raise InputError(
                    f"{folder}: the checkpoint of step {found.step} is another run's: its tensors have other names, "
                    "shapes or types; remove the folder to start again"
                )
        del ours, mine, theirs
        self.model.update(tree_unflatten(list(found.parameters.items())))
        self.optimizer.state = tree_unflatten(list(found.optimizer.items()))
        facts = found.facts
        self.step, self.tokens, self.scale = found.step, facts["tokens"], LossScale(**facts["loss_scale"])
        self.guard, self.measured, self.trouble = Guard(**facts["guard"]), facts[state.HELD_OUT], None
        self.backprop.seen = facts.get(_ROOMS, [0, []])
        self._follow_schedule()


def _kinds(tensors: dict[str, mx.array]) -> dict[str, tuple[tuple[int, ...], mx.Dtype]]:
    return {name: (a.shape, a.dtype) for name, a in tensors.items()}


def _added(sums: dict[str, mx.array], more: dict[str, mx.array]) -> dict[str, mx.array]:
    """Both sums, in float32."""
    made = {n: g.astype(mx.float32) + sums[n] if n in sums else g.astype(mx.float32) for n, g in more.items()}
    mx.eval(made)
    return made


def run_to_end(trainer: Trainer, work: Path, progress: Progress, mirror: Mirror | None = None) -> dict[str, Any]:
    """Train to the last step, resuming what `work` holds; checkpoints and metrics.jsonl go there, its lines to `mirror`
    too. Returns the run's facts.

    Raises Stopped after SIGTERM or SIGINT, with the state saved; DiskFull where there is no room for the checkpoints;
    Diverged where the training goes wrong however often it is set back (see guard.py).
    """
    with StopRequest() as stop:
        return _Run(trainer, work, progress, stop, mirror).to_end()


class _Run:
    """One process's share of a training."""

    def __init__(
        self, trainer: Trainer, work: Path, progress: Progress, stop: StopRequest, mirror: Mirror | None = None
    ):
        self.trainer, self.work, self.progress, self.stop = trainer, durable.private_folder(work), progress, stop
        self.resumed = trainer.resume(work)
        disk.require(work, trainer.room(work))
        self.saved = trainer.step if self.resumed else -1  # the step whose state is on disk
        self.metrics = MetricsFile(work / METRICS, mirror)
        self.metrics.rewind(trainer.step, trainer.guard.rollbacks)
        split, c = trainer.held_out if trainer.held_out.rows else trainer.train, trainer.config
        self.watch = experts.Watch(trainer.model, split, c.steps, c.log_every)

    def to_end(self) -> dict[str, Any]:
        t, c = self.trainer, self.trainer.config
        mx.reset_peak_memory()
        started, first, trained = time.perf_counter(), t.step, 0
        self._settle()  # there is a checkpoint of step 0, and an evaluation that a stop broke off is made up for
        while t.step < c.steps:
            m = t.one_step()
            trained += 1
            if t.step % c.log_every == 0 or t.step == 1 or t.step == c.steps or m.skipped:
                self.metrics(asdict(m))
            if (t.step % self.watch.every == 0 or t.step in (1, c.steps)) and (look := self.watch(t.step)):
                self.metrics(look)
            facts = {"loss": m.loss, "tokens_per_s": m.tokens_per_s, "peak_gib": m.peak_gib}
            if isinstance(m, PairMetrics):
                facts["pair_accuracy"] = m.pair_accuracy
            self.progress(t.step, c.steps, **{k: v for k, v in facts.items() if math.isfinite(v)})
            self._settle()
        seconds = time.perf_counter() - started
        return {
            "steps": t.step,
            "resumed_from": first if self.resumed else 0,
            "target_tokens": t.tokens,
            "tokens_per_s": trained * c.batch * c.accumulate * t.train.seq_len / seconds,
            "peak_gib": mx.get_peak_memory() / GIB,
            "seconds": seconds,
            "skipped": t.step - int(np.array(t.optimizer.step)),
            "rollbacks": t.guard.rollbacks,
        }

    def _settle(self) -> None:
        """After a step: go back where it went wrong; evaluate, save and stop where that is due."""
        t = self.trainer
        trouble = t.trouble
        if trouble is None:
            try:
                self._save(self._evaluated())
            except NotFinite as e:
                trouble = Trouble(str(e), (t.step,))
        if self.stop.requested:
            state_is = "the state is saved" if trouble is None else f"it went wrong ({trouble.why}) and is not saved"
            raise Stopped(f"stopped at step {t.step} of {t.config.steps}; {state_is}, the next start continues")
        if trouble is not None:
            self._set_back(trouble)

    def _evaluated(self) -> bool:
        """Measure the held-out loss where that is due. Whether the state is to be saved with it, for it is the best."""
        t, c = self.trainer, self.trainer.config
        due = t.step == c.steps or (c.evaluate_every and t.step and t.step % c.evaluate_every == 0)
        if not due or t.measured is not None:
            return False
        loss = t.held_out_loss(unless=lambda: self.stop.requested)
        if loss is None:
            return False
        more = {f"held_out_{name}": value for name, value in asdict(t.preferred).items()} if t.preferred else {}
        self.metrics({"step": t.step, "held_out_loss": loss} | more)
        t.measured = loss if math.isfinite(loss) else None
        best = state.best(self.work)
        return t.measured is not None and (self.saved == t.step or best is None or loss < best[1])

    def _save(self, wanted: bool) -> None:
        """Save where `wanted` or due: at every multiple of checkpoint_every, or as soon after it as the state is not in
        doubt, so that one stays that is older than the doubt.
        """
        t, every = self.trainer, self.trainer.config.checkpoint_every
        due = t.step // every > self.saved // every and not t.guard.doubts(t.step)
        if wanted or (self.saved != t.step and (due or t.step == t.config.steps or self.stop.requested)):
            t.save(self.work)
            self.saved = t.step

    def _set_back(self, trouble: Trouble) -> None:
        t = self.trainer
        at = t.step
        t.roll_back(self.work, trouble)
        self.saved = t.step
        self.metrics.rewind(t.step, t.guard.rollbacks)
        log.warning(
            "step %d: %s; set back to step %d, the batches of steps %s are passed over from now on",
            at, trouble.why, t.step, ", ".join(str(p["step"]) for p in t.guard.rollbacks[-1]["passed"]),
        )  # fmt: skip
