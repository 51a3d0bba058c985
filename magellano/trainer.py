"""One training loop for a full base and for an adapter: what differs is which parameters are trainable.

A step is `accumulate` micro-batches; every target token of the step weighs the same, however tokens fall into
micro-batches. What a step does depends on (settings, step number) and the parameters alone, so that a resumed run
repeats it to the bit.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from magellano import activations, state
from magellano.backend import compute_dtype, mx, tree_flatten, tree_unflatten
from magellano.backprop import Backprop, Batch
from magellano.data import shards
from magellano.errors import Stopped
from magellano.layout import parameters
from magellano.model import MagellanoLM
from magellano.names import METRICS, Compute
from magellano.ops.cross_entropy import Renyi
from magellano.optimizer import AdamW, cosine_with_warmup, global_norm, gradient_factor
from magellano.profile import LossConfig, TrainConfig
from magellano.progress import Progress
from magellano.signals import StopRequest

GIB = float(1 << 30)
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


@dataclass
class Metrics:
    """One line of metrics.jsonl. loss: plain cross-entropy in nats a target token, whatever is minimised; norm: before
    clipping; skipped: gradient not finite.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int  # target tokens so far
    tokens_per_s: float  # input tokens, all of the row
    peak_gib: float  # MLX's own counter
    seconds: float
    skipped: bool = False


class Trainer:
    """Trains what is trainable in `model` on the split `train` of a tokens folder, by default for cross-entropy."""

    def __init__(
        self,
        model: MagellanoLM,
        config: TrainConfig,
        tokens: Path,
        loss: LossConfig | None = None,
        limit_gib: float = 0.0,
    ):
        """`limit_gib`: as the profile's [memory]; 0: none."""
        self.model, self.config = model, config
        self.train, self.held_out = shards.Shards(tokens, "train"), shards.Shards(tokens, "held_out")
        model.compute = compute_dtype(config.compute)
        model.chunk = config.loss_chunk
        model.keep_small_dense()
        self.routers = any(name.endswith("router.weight") for name in dict(tree_flatten(model.trainable_parameters())))
        decays = {spec.name for spec in parameters(model.config) if spec.decays}
        self.optimizer = AdamW(
            config.lr, (config.beta1, config.beta2), config.eps, config.weight_decay, config.state, config.seed,
            decays=lambda name: name in decays or ".lora_" in name,
        )  # fmt: skip
        self.optimizer.init(model.trainable_parameters())
        float16 = config.compute is Compute.FLOAT16
        self.scale = LossScale(SCALE_START, dynamic=True) if float16 else LossScale()
        self.step, self.tokens = 0, 0
        self._follow_schedule()
        self.backprop = Backprop(
            model, Renyi(loss.alpha, loss.beta) if loss and loss.has_entropy else None,
            keeps=not activations.recomputes(model, config, config.batch * self.train.seq_len, limit_gib),
        )  # fmt: skip

    def one_step(self) -> Metrics:
        """Take the next step and return its metrics."""
        c, started = self.config, time.perf_counter()
        batches = [self._micro_batch(i) for i in range(c.accumulate)]
        total = sum(float(b.weights.sum()) for b in batches)
        grads: dict[str, mx.array] = {}
        nll, squares = mx.zeros(()), mx.zeros(())
        routers = (c.balance_loss / c.accumulate, c.router_z_loss / c.accumulate) if self.routers else None
        for rows in batches:
            batch = Batch(*(mx.array(a) for a in (rows.tokens, rows.targets, rows.weights, rows.reset)))
            scaled = None if routers is None else (routers[0] * self.scale.value, routers[1] * self.scale.value)
            found = self.backprop(batch, self.scale.value / max(total, 1.0), scaled)
            nll, squares = nll + found.nll, found.squares
            grads = _added(grads, found.gradients) if c.accumulate > 1 else found.gradients
            del found  # its gradients must not outlast the next pass
        norm = mx.sqrt(squares.sum()) if c.accumulate == 1 else global_norm(grads)
        # The update is on its way before the norm is known here; a factor that is not finite changes nothing.
        factor = gradient_factor(norm + (nll - nll), c.clip_norm, self.scale.value)
        self.optimizer.consume(self.model, grads, factor=factor)
        self.optimizer.evaluate(self.model.trainable_parameters(), norm, nll)
        loss, grad_norm = float(np.array(nll)) / max(total, 1.0), float(np.array(norm)) / self.scale.value
        finite, lr = bool(np.isfinite(grad_norm) and np.isfinite(loss)), self._rate(self.step)
        if not finite:
            self.optimizer.take_back()
        self.scale.update(finite)
        self.step += 1
        self.tokens += int(total)
        if not finite:
            self._follow_schedule()
        seconds = time.perf_counter() - started
        inputs = c.batch * c.accumulate * self.train.seq_len
        return Metrics(
            self.step, loss, lr, grad_norm, self.tokens, inputs / seconds,
            mx.get_peak_memory() / GIB, seconds, not finite,
        )  # fmt: skip

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

    def _micro_batch(self, micro: int) -> shards.Batch:
        c = self.config
        first = (self.step * c.accumulate + micro) * c.batch
        return self.train.batch(shards.indices(first, c.batch, self.train.rows, c.seed))

    def held_out_loss(self, rows: int = 64) -> float:
        """Nats a target token over the first `rows` held-out rows; training is left as it was."""
        nll, total = 0.0, 0.0
        for first in range(0, min(rows, self.held_out.rows), self.config.batch):
            index = np.arange(first, min(first + self.config.batch, rows, self.held_out.rows))
            b = self.held_out.batch(index)
            scores, _ = self.model.scores(
                mx.array(b.tokens), mx.array(b.targets), mx.array(b.reset), self.config.loss_chunk
            )
            nll += float((np.array(scores) * b.weights).sum())
            total += float(b.weights.sum())
        return nll / max(total, 1.0)

    def tensors(self) -> dict[str, mx.array]:
        """The trainable parameters by name."""
        return dict(tree_flatten(self.model.trainable_parameters()))

    def save(self, folder: Path) -> None:
        """Write the whole running state, sealed: parameters, optimiser, loss scale, position."""
        facts = {"step": self.step, "tokens": self.tokens, "loss_scale": asdict(self.scale)}
        state.save(folder, self.step, self.tensors(), dict(tree_flatten(self.optimizer.state)), facts)

    def resume(self, folder: Path) -> bool:
        """Continue from the last verified checkpoint under `folder`, if there is one."""
        found = state.latest(folder)
        if found is None:
            return False
        facts = found.facts
        self.model.update(tree_unflatten(list(found.parameters.items())))
        self.optimizer.state = tree_unflatten(list(found.optimizer.items()))
        self.step, self.tokens, self.scale = facts["step"], facts["tokens"], LossScale(**facts["loss_scale"])
        self._follow_schedule()
        return True


def _added(sums: dict[str, mx.array], more: dict[str, mx.array]) -> dict[str, mx.array]:
    """Both sums, in float32."""
    made = {n: g.astype(mx.float32) + sums[n] if n in sums else g.astype(mx.float32) for n, g in more.items()}
    mx.eval(made)
    return made


def run_to_end(trainer: Trainer, work: Path, progress: Progress) -> dict[str, Any]:
    """Train to the last step, resuming what `work` holds; checkpoints and metrics.jsonl go there. Returns the run's
    facts.

    Raises Stopped after SIGTERM or SIGINT, with the state saved.
    """
    work.mkdir(parents=True, exist_ok=True, mode=0o700)
    c, resumed, metrics = trainer.config, trainer.resume(work), MetricsFile(work / METRICS)
    metrics.rewind(trainer.step)
    mx.reset_peak_memory()
    started, first = time.perf_counter(), trainer.step
    with StopRequest() as stop:
        while trainer.step < c.steps:
            m = trainer.one_step()
            last = trainer.step == c.steps
            if trainer.step % c.log_every == 0 or trainer.step == 1 or last or m.skipped:
                metrics(asdict(m))
            progress(trainer.step, c.steps, loss=m.loss, tokens_per_s=m.tokens_per_s, peak_gib=m.peak_gib)
            if last or (c.evaluate_every and trainer.step % c.evaluate_every == 0):
                metrics({"step": trainer.step, "held_out_loss": trainer.held_out_loss()})
            if last or stop.requested or trainer.step % c.checkpoint_every == 0:
                trainer.save(work)
            if stop.requested and not last:
                raise Stopped(
                    f"stopped at step {trainer.step} of {c.steps}; the state is saved, the next start continues"
                )
    seconds = time.perf_counter() - started
    inputs = (trainer.step - first) * c.batch * c.accumulate * trainer.train.seq_len
    return {
        "steps": trainer.step,
        "resumed_from": first if resumed else 0,
        "target_tokens": trainer.tokens,
        "tokens_per_s": inputs / seconds,
        "peak_gib": mx.get_peak_memory() / GIB,
        "seconds": seconds,
    }


class MetricsFile:
    """metrics.jsonl in the work folder; on resume, lines after the checkpoint's step go, so that none stands twice."""

    def __init__(self, path: Path):
        self.path = path

    def rewind(self, step: int) -> None:
        """Keep the lines up to `step`."""
        kept = [line for line in self._lines() if line["step"] <= step] if self.path.is_file() else []
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def _lines(self) -> Iterator[dict[str, Any]]:
        for text in self.path.read_text(encoding="utf-8").splitlines():
            try:
                yield json.loads(text)
            except json.JSONDecodeError:
                return  # a line cut off by a kill: it lies after the checkpoint

    def __call__(self, line: dict[str, Any]) -> None:
        with open(self.path, "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
