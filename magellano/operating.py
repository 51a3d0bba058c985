"""The sections of a profile that say how its runs are looked after. They are no part of any artifact."""

from typing import Annotated

from pydantic import Field

from magellano.names import Event
from magellano.section import NonNegative, Section

Told = Annotated[Event, Field(strict=False)]


class DiskConfig(Section):
    """What everything under $MAGELLANO_HOME may take. 0: no limit but the disk's."""

    budget_gib: NonNegative = 0.0  # after a run, what `magellano gc` may remove goes, oldest first, until it fits


class NotifyConfig(Section):
    """A command of the owner's that is told how a run ended; see magellano/notify.py."""

    command: tuple[str, ...] = Field(default=(), strict=False)  # program and arguments, no shell; empty: none
    on: tuple[Told, ...] = Field(default=(Event.FAILURE, Event.PROMOTION), strict=False)


class LoggingConfig(Section):
    """Where a training's metrics go besides metrics.jsonl; see magellano/tensorboard.py."""

    tensorboard: bool = False
    folder: str = ""  # "": $MAGELLANO_HOME/tensorboard
