"""What can go wrong for a user, and the exit code that each kind of failure has on the command line."""

from enum import IntEnum


class ExitCode(IntEnum):
    """Exit status of `magellano`; schedulers and tests rely on these numbers."""

    DONE = 0
    FAILED = 1
    BAD_INPUT = 2
    OUT_OF_MEMORY = 3
    RESUMABLE = 75  # EX_TEMPFAIL: stopped on purpose, the next start continues


class InputError(ValueError):
    """Bad input or configuration. One line: what is wrong, where (file, row, key), and the remedy."""

    exit_code = ExitCode.BAD_INPUT


class DiskFull(OSError):
    """The disk cannot hold what a stage must write. Nothing half-written is left behind."""

    exit_code = ExitCode.FAILED


class OutOfMemory(MemoryError):
    """The run does not fit the memory that it may use."""

    exit_code = ExitCode.OUT_OF_MEMORY


class Diverged(FloatingPointError):
    """The training went wrong again and again: numbers that are not finite, or losses that jump."""

    exit_code = ExitCode.FAILED


class Stopped(Exception):
    """Training stopped on a signal after saving its state; the next start continues from there."""

    exit_code = ExitCode.RESUMABLE


class Aborted(RuntimeError):
    """The process that trains died of something that is neither memory nor a signal to stop, twice. The next start
    continues from its last checkpoint.
    """

    exit_code = ExitCode.FAILED
