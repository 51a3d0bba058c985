"""What this machine is and what was chosen on it: for `magellano info`, reports and bug reports."""

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("scm-magellano", "mlx", "numpy", "safetensors", "tiktoken", "pydantic", "prefect", "datasets", "pandera")


def machine() -> dict[str, Any]:
    """Operating system, processor, cores and memory. `memory_bytes` is None where the system does not tell."""
    return {
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": memory_bytes(),
        "python": platform.python_version(),
    }


def cache_root() -> Path:
    """$MAGELLANO_CACHE, else $XDG_CACHE_HOME/magellano, else ~/.cache/magellano: what can be made again."""
    if root := os.environ.get("MAGELLANO_CACHE"):
        return Path(root)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "magellano"


def memory_bytes() -> int | None:
    """Physical memory, or what a control group leaves of it."""
    try:
        physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    try:
        with open("/sys/fs/cgroup/memory.max", encoding="ascii") as f:
            limit = f.read().strip()
    except OSError:
        return physical
    return min(physical, int(limit)) if limit.isdigit() else physical


def versions() -> dict[str, str | None]:
    """Installed versions; None for a package of an extra that is not installed."""
    found: dict[str, str | None] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found
