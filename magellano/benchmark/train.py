"""A profile's training step as the train stage takes it, on seeded weights and random tokens: time, tokens a second,
MLX's peak memory, useful arithmetic, and its share of the rate that a square product reaches in the same run.
"""

import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from magellano import memory, plan, roofline
from magellano.backend import mx, on_gpu
from magellano.benchmark import machine, synthetic
from magellano.benchmark.trace import trace as where_it_goes
from magellano.profile import Profile
from magellano.trainer import Trainer

WARM_UP = 3  # steps: kernels are compiled at first use


def run(profile: Profile, steps: int = 10, trace: bool = False) -> dict[str, Any]:
    """Times in ms, median and best of `steps` steps after a few that warm up; peak memory in GiB; `grown_mib`: memory
    in use after them less that before, which shows over many steps whether something stays. `trace`: and where a
    step's time and memory go (see trace.py).
    """
    ceilings = roofline.measured()
    rate = ceilings.matmul
    mx.clear_cache()
    with memory.hold(profile) as (profile, held), tempfile.TemporaryDirectory() as folder:
        planned = plan.fine_tune(profile, on_gpu())
        model = synthetic.model(profile)
        weights = mx.get_active_memory()
        trainer = Trainer(
            model, profile.train, synthetic.tokens(Path(folder), profile), limit_gib=profile.memory.limit_gib
        )
        warm = [trainer.one_step() for _ in range(WARM_UP)]
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        taken = [trainer.one_step() for _ in range(steps)]
        peak, grown = mx.get_peak_memory(), mx.get_active_memory() - before
        parts = where_it_goes(trainer, profile) if trace else []
    seconds = median(m.seconds for m in taken)
    return {
        **machine.where(),
        "profile": profile.name,
        "parameters": planned.parameters,
        "trainable": planned.trainable,
        "batch": profile.train.batch,
        "seq_len": profile.data.seq_len,
        "compute": str(model.compute).removeprefix("mlx.core."),
        "step_ms": seconds * 1e3,
        "planned_step_ms": roofline.step(profile, ceilings).seconds * 1e3,
        "best_step_ms": min(m.seconds for m in taken) * 1e3,
        "tokens_per_s": planned.tokens_per_step / seconds,
        "peak_gib": peak / (1 << 30),
        "weights_gib": weights / (1 << 30),
        "grown_mib": grown / (1 << 20),
        **held,
        "planned_moment": planned.moment,
        "tflop_s": planned.flops_per_step / seconds / 1e12,
        "matmul_tflop_s": rate / 1e12,
        "share_of_matmul": planned.flops_per_step / seconds / rate,
        "first_step_s": warm[0].seconds,
        "losses": [m.loss for m in [*warm, *taken]],
        **({"trace": parts} if trace else {}),
    }
