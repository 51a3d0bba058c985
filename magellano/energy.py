"""What a run took: time, energy and money.

Energy is read where the machine tells it: the processor's own counter (RAPL, /sys/class/powercap, on most systems for
root alone) and NVIDIA's power draw. What nobody tells is estimated from the prices file's watts, and marked so.
"""

import logging
import shutil
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from magellano.prices import Prices

log = logging.getLogger(__name__)

POWERCAP = Path("/sys/class/powercap")
INTERVAL = 5.0  # seconds between two looks; a RAPL counter overflows after minutes
JOULES_PER_KWH = 3.6e6


class Meter:
    """Watches the machine from `start` to `stop`: `seconds` and `joules` by source. What else runs on it counts too."""

    def __init__(self, powercap: Path = POWERCAP, gpu_watts: Callable[[], float | None] | None = None) -> None:
        self._counters = _counters(powercap)
        self._gpu_watts = gpu_watts or (nvidia_watts if shutil.which("nvidia-smi") else None)
        self._joules: dict[str, float] = {}
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._started = self._looked = time.monotonic()
        self._seconds: float | None = None
        self._read: dict[Path, int | None] = {}
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def start(self) -> "Meter":
        self._started = self._looked = time.monotonic()
        self._read = {counter: _microjoules(counter) for counter in self._counters}
        if self._counters or self._gpu_watts:
            self._thread.start()
        return self

    def stop(self) -> "Meter":
        self._seconds = time.monotonic() - self._started
        self._stopped.set()
        if self._thread.is_alive():
            self._thread.join(2 * INTERVAL)
        self._look()
        return self

    def facts(self, prices: Prices) -> dict[str, Any]:
        """What was taken until `stop`, or until now: seconds; kwh; by: kWh by source; estimated: whether watts were
        assumed; watts on average; money; currency; how, in words.
        """
        if self._seconds is None:
            self._look()
        seconds = time.monotonic() - self._started if self._seconds is None else self._seconds
        by = {source: joules / JOULES_PER_KWH for source, joules in self._joules.items()}
        hours = seconds / 3600
        how = [f"{source} told" for source in by]
        if "processor" not in by:  # a GPU's draw is not the machine's
            by["estimate"] = prices.machine.watts / 1000 * hours
            how.append(f"estimate: {prices.machine.watts:g} W assumed for the machine")
        return {**cost(seconds, by, prices), "how": "; ".join(how)}

    def _watch(self) -> None:
        while not self._stopped.wait(INTERVAL):
            self._look()

    def _look(self) -> None:
        with self._lock:
            now = time.monotonic()
            for counter, before in self._read.items():
                value = _microjoules(counter)
                if value is not None and before is not None:
                    gone = value - before if value >= before else value - before + _range(counter)
                    self._joules["processor"] = self._joules.get("processor", 0.0) + gone / 1e6
                self._read[counter] = value
            if self._gpu_watts and (watts := self._gpu_watts()) is not None:
                self._joules["gpu"] = self._joules.get("gpu", 0.0) + watts * (now - self._looked)
            self._looked = now


def cost(seconds: float, by: dict[str, float], prices: Prices) -> dict[str, Any]:
    """The facts of `Meter.facts` from seconds and kWh by source: kWh * price, and the machine's price by its hours."""
    kwh = sum(by.values())
    return {
        "seconds": round(seconds, 3), "kwh": kwh, "by": by, "estimated": "estimate" in by,
        "watts": round(kwh * 3.6e6 / seconds, 2) if seconds else 0.0,
        "money": kwh * prices.kwh + seconds / 3600 * prices.machine.per_hour, "currency": prices.currency,
    }  # fmt: skip


def added(a: dict[str, Any] | None, b: dict[str, Any]) -> dict[str, Any]:
    """The facts of two stretches of one run, as those of one."""
    if a is None:
        return b
    by = {source: a["by"].get(source, 0.0) + b["by"].get(source, 0.0) for source in {**a["by"], **b["by"]}}
    seconds, kwh = a["seconds"] + b["seconds"], a["kwh"] + b["kwh"]
    return {
        **b, "seconds": round(seconds, 3), "kwh": kwh, "by": by, "estimated": a["estimated"] or b["estimated"],
        "watts": round(kwh * 3.6e6 / seconds, 2) if seconds else 0.0, "money": a["money"] + b["money"],
    }  # fmt: skip


def nvidia_watts() -> float | None:
    """What all NVIDIA GPUs of this machine draw now; None where nvidia-smi does not tell."""
    command = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=INTERVAL, check=True).stdout
        return sum(float(line) for line in said.split("\n") if line.strip())
    except (OSError, subprocess.SubprocessError, ValueError):  # "[N/A]" on some cards
        return None


def _counters(powercap: Path) -> list[Path]:
    """One counter per processor package that may be read. Zones below a package are parts of it, "psys" holds them."""
    names = sorted(powercap.glob("intel-rapl:*/name")) if powercap.is_dir() else []
    packages = [name.parent for name in names if name.read_text(encoding="ascii").startswith("package")]
    found = [zone / "energy_uj" for zone in packages]
    return [counter for counter in found if _microjoules(counter) is not None]


def _microjoules(counter: Path) -> int | None:
    try:
        return int(counter.read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _range(counter: Path) -> int:
    """How far a counter goes before it starts again."""
    return _microjoules(counter.with_name("max_energy_range_uj")) or 0
