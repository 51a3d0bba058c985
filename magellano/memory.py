"""Keeps a training to its plan: the [memory] limit is held, or the run is refused before anything is loaded."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from magellano import plan
from magellano.backend import hold_memory, on_gpu
from magellano.errors import OutOfMemory
from magellano.plan import GIB
from magellano.profile import Profile

log = logging.getLogger(__name__)

SMALL = 64 << 20  # bytes at which a GPU is held at the least: below that there is nothing to gain
OVERSHOOT = 0.97  # of a limit, at which MLX is held on a GPU: it allocates once more before it waits
LATE = 64 << 20  # bytes below the plan at which it is held without a limit, for the same reason: production3b 1 x 512
# peaked 0.03 to 0.07 GiB above its plan when held at that, and 0.02 at most so


@contextmanager
def hold(profile: Profile) -> Iterator[tuple[Profile, dict[str, Any]]]:
    """Inside the `with` MLX keeps to memory.limit_gib, a GPU without a limit to its plan. Gives the
    profile as it can be trained so, with a smaller train.loss_chunk if that is what it takes; and what was planned and
    set, for the run's facts: planned_gib, held_gib (None: nothing is held), loss_chunk.

    Raises OutOfMemory where no chunk makes it fit.
    """
    limit = int(profile.memory.limit_gib * GIB)
    if limit:
        profile = _within(profile, limit)
    planned = plan.fine_tune(profile, on_gpu()).total
    facts = {"planned_gib": planned / GIB, "held_gib": None, "loss_chunk": profile.train.loss_chunk}
    if not limit and not on_gpu():
        yield profile, facts
        return
    held_at = int(OVERSHOOT * limit) if limit and on_gpu() else limit or max(planned - LATE, SMALL)
    with hold_memory(held_at) as held:
        yield profile, {**facts, "held_gib": held / GIB}


def _within(profile: Profile, limit: int) -> Profile:
    fitting = plan.fit(profile, on_gpu(), limit)
    needed = plan.fine_tune(fitting, on_gpu()).total
    if needed > limit:
        raise OutOfMemory(
            f"profile {profile.name}: training needs about {needed / GIB:.2f} GiB, memory.limit_gib is "
            f"{profile.memory.limit_gib:g}; lower train.batch or data.seq_len, or raise the limit"
        )
    if fitting.train.loss_chunk < profile.train.loss_chunk:
        log.warning(
            "profile %s: train.loss_chunk %d is taken as %d, so that training keeps to memory.limit_gib %g",
            profile.name, profile.train.loss_chunk, fitting.train.loss_chunk, profile.memory.limit_gib,
        )  # fmt: skip
    return fitting
