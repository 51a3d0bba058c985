"""[logging] tensorboard: a training's metrics as event files of TensorBoard, made by tensorboardX, on this machine.

    <folder>/<profile>/<stage>-<key>/events.out.tfevents.*        tensorboard --logdir <folder>

They mirror metrics.jsonl. Each start, and each time that a training is set back, writes them anew from it: no point
stands twice, and none that was taken back stays. What is written anew has the time of writing.
"""

import importlib.util
import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from magellano import artifacts, durable
from magellano.errors import InputError
from magellano.profile import Profile

log = logging.getLogger(__name__)

PACKAGE = "tensorboardX"
TAGS = {
    "loss": "train/loss", "lr": "train/lr", "grad_norm": "train/grad_norm", "tokens_per_s": "speed/tokens_per_s",
    "peak_gib": "memory/peak_gib", "held_out_loss": "held_out/loss",
}  # fmt: skip


def check(profile: Profile) -> None:
    """InputError where the profile asks for it and the package is not there."""
    if profile.logging.tensorboard and importlib.util.find_spec(PACKAGE) is None:
        raise InputError(
            f"profile {profile.name}: logging.tensorboard needs the package {PACKAGE}: pip install {PACKAGE}, "
            "or set it to false"
        )


def mirror(profile: Profile, work: Path) -> "Mirror | None":
    """That of the training in this work folder, where the profile asks for one. InputError as `check`."""
    if not profile.logging.tensorboard:
        return None
    check(profile)
    asked = profile.logging.folder
    folder = Path(asked).expanduser() if asked else artifacts.home() / "tensorboard"
    return Mirror(folder / profile.name / f"{work.parent.name}-{work.name[:8]}")


class Mirror:
    """The event files of one training. Where they cannot be written it says so once; the training goes on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._writer: Any = None

    def begin(self, lines: Iterable[dict[str, Any]]) -> None:
        """Write these lines of metrics.jsonl, in place of all that is there."""
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        try:
            self._end()
            durable.private_folder(self.folder)
            former = set(self.folder.glob("events.out.tfevents.*"))
            self._writer = EventsWriter(str(self.folder / "events"), f".{time.time_ns()}")  # later than the former
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            # A TensorBoard that is open forgets what it has read of the former file.
            self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=0, session_log=start))
            for line in lines:
                self._write(line)
            self._writer.flush()
            for path in former:  # emptied, and gone the next time: an open TensorBoard gets stuck where one is missing
                os.truncate(path, 0) if path.stat().st_size else path.unlink()
        except OSError as e:
            self._give_up(e)

    def add(self, line: dict[str, Any]) -> None:
        """Write one more line."""
        if self._writer is None:
            return
        try:
            self._write(line)
            self._writer.flush()
        except OSError as e:
            self._give_up(e)

    def _write(self, line: dict[str, Any]) -> None:
        from tensorboardX.proto import event_pb2, summary_pb2

        found = [summary_pb2.Summary.Value(tag=TAGS[k], simple_value=v) for k, v in line.items() if k in TAGS]
        if found:
            summary = summary_pb2.Summary(value=found)
            self._writer.write_event(event_pb2.Event(wall_time=time.time(), step=line["step"], summary=summary))

    def _end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _give_up(self, error: OSError) -> None:
        log.warning("logging.tensorboard: %s: %s; the training goes on without it", self.folder, error)
        self._writer = None
