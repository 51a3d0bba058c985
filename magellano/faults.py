"""What ended a process that trains: out of memory, a GPU fault, a kill or a crash. MLX has no exceptions of its own for
these: on Metal both come as an abort of the whole process whose message stands on standard error.
"""

import re
import signal
from pathlib import Path

from magellano.names import Fault

_MEMORY = re.compile(
    r"insufficient memory|CallbackErrorOutOfMemory|out of memory|bad_alloc|unable to allocate|cannot allocate memory"
    r"|\[[\w:]*malloc\w*\]|maximum allowed buffer size|cudaErrorMemoryAllocation|MemoryError",
    re.IGNORECASE,
)
_GPU = re.compile(
    r"\[METAL\]|IOGPUCommandBuffer|GPU (?:hang|timeout)|CUDA error"
    r"|\bcu(?:da|blas|dnn)\w*(?:\([^)]*\))? (?:failed|error)"
    r"|Failed to load compiled|There is no kernel named"  # a file of MLX's cache of kernels that was left half-written
    r"|illegal (?:memory access|address|instruction was)|unspecified launch failure|uncorrectable ECC",
    re.IGNORECASE,
)
_VMSTAT = Path("/proc/vmstat")


def of_text(text: str) -> Fault | None:
    """The fault that a message of MLX, CUDA, Metal or the C++ runtime tells of; None where it tells of neither memory
    nor the GPU.
    """
    if _MEMORY.search(text):
        return Fault.MEMORY
    return Fault.GPU if _GPU.search(text) else None


def of_exit(code: int, tail: str, kernel_killed: bool | None) -> tuple[Fault, str]:
    """The fault of a process that ended with `code` (negative: by that signal), having said `tail`, and one line on it.
    `kernel_killed`: whether the kernel killed for want of memory meanwhile; None: it does not tell.
    """
    ended = f"exit code {code}" if code >= 0 else _signal_name(-code)
    if -code == signal.SIGKILL and kernel_killed is not False:
        return Fault.MEMORY, f"{ended} by the kernel, which had no memory left" if kernel_killed else ended
    if -code == signal.SIGKILL:
        return Fault.KILLED, ended
    fault = of_text(tail) or Fault.CRASHED
    telling = next((line for line in reversed(tail.splitlines()) if of_text(line)), "")
    return fault, f"{ended}: {' '.join(telling.split())[:300]}" if telling else ended


def kernel_kills() -> int | None:
    """How often this machine's kernel has killed for want of memory since it started; None where it does not tell."""
    try:
        found = re.search(r"^oom_kill (\d+)$", _VMSTAT.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return None
    return int(found[1]) if found else None


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
