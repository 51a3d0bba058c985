"""What holding memory costs on a GPU: a profile's step, held at its plan and around it, in one process and in turn, for
steps of one kind differ more between two runs than between two settings. $MLX_MAX_OPS_PER_BUFFER and
$MLX_USE_CUDA_GRAPHS may be set beside it.

    python benchmarks/gpu_hold.py [PROFILE] [BATCH]
"""

import gc
import os
import sys
import tempfile
from pathlib import Path

from magellano import plan
from magellano.backend import device_memory, hold_memory, mx, on_gpu
from magellano.benchmark import synthetic
from magellano.memory import LATE
from magellano.profile import load_profile
from magellano.trainer import Trainer

GIB, STEPS, WARM_UP = 1 << 30, 13, 3


def main() -> None:
    if not on_gpu():
        sys.exit("gpu_hold.py: needs a GPU")
    name, batch = sys.argv[1] if len(sys.argv) > 1 else "production3b", sys.argv[2] if len(sys.argv) > 2 else "4"
    profile = load_profile(name, {"train.batch": int(batch), "train.lr": 2e-5})
    planned, model = plan.fine_tune(profile, True).total, synthetic.model(profile)
    everything = device_memory() or 1 << 40
    ways = {
        "below the plan": max(planned - LATE, 0),
        "the plan": planned,
        "above it": planned + 2 * LATE,
        "not": everything,
    }
    launches = os.environ["MLX_MAX_OPS_PER_BUFFER"]
    print(f"{name}, batch {batch}, planned {planned / GIB:.3f} GiB, {launches} launches a batch")
    for way, held in [*ways.items(), *ways.items()]:
        gc.collect()
        mx.clear_cache()
        with hold_memory(held), tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(model, profile.train, synthetic.tokens(Path(folder), profile))
            for _ in range(WARM_UP):
                trainer.one_step()
            mx.reset_peak_memory()
            seconds = sorted(trainer.one_step().seconds for _ in range(STEPS))
            peak, middle = mx.get_peak_memory() / GIB, seconds[STEPS // 2]
        rate = profile.train.batch * profile.data.seq_len / middle
        print(
            f"held at {way:15} median {middle * 1e3:6.1f}, best {seconds[0] * 1e3:6.1f} ms, {rate:7.0f} tokens/s, "
            f"peak {peak:.3f} GiB"
        )


if __name__ == "__main__":
    main()
