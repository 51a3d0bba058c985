"""A local command of the owner's that is told how a run ended: [notify] in the profile.

The command gets the facts as one JSON object on standard input, and MAGELLANO_EVENT, MAGELLANO_RUN, MAGELLANO_PROFILE
and MAGELLANO_TEXT in its environment. It is run without a shell; what it prints is not kept. It cannot fail the run.
"""

import json
import logging
import os
import subprocess
from typing import Any

from magellano.names import Decision, Event, RunState
from magellano.profile import NotifyConfig

log = logging.getLogger(__name__)

PATIENCE = 30.0  # seconds that the command has


def event(state: RunState, gate: dict[str, Any] | None) -> Event | None:
    """What there is to tell about a run that ended so; None: nothing."""
    if state is RunState.FAILED:
        return Event.FAILURE
    if gate and gate["decision"] == Decision.PROMOTED:
        return Event.PROMOTION
    return Event.KEPT_ASIDE if gate and gate["decision"] == Decision.KEPT_ASIDE else None


def tell(config: NotifyConfig, what: Event | None, number: int, profile: str, text: str) -> None:
    """Run the command where it wants to hear of that."""
    if not config.command or what is None or what not in config.on:
        return
    facts = {"event": what, "run": number, "profile": profile, "text": text}
    named = {f"MAGELLANO_{name.upper()}": str(value) for name, value in facts.items()}
    try:
        done = subprocess.run(
            config.command, input=json.dumps(facts).encode(), env=os.environ | named, timeout=PATIENCE,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as e:
        log.warning("notify.command %s: %s; the run is not affected", config.command[0], e)
        return
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        log.warning("notify.command %s ended with %d: %s", config.command[0], done.returncode, said[0])
