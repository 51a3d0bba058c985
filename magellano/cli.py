"""`magellano COMMAND`: one module of magellano.commands per command, one place for exit codes.

Nothing heavy is imported here or at the top of a command, so that `magellano --help` answers at once.
"""

import argparse
import errno
import json
import os
import sys
from typing import Any, NoReturn

from magellano import signals
from magellano.commands import COMMANDS
from magellano.errors import Aborted, DiskFull, ExitCode, InputError, OutOfMemory, Stopped

EXIT_CODES = (
    "exit codes: 0 done, 2 bad input or config, 3 out of memory, 75 stopped and can be resumed, 1 anything else"
)


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="magellano",
        description="Fine-tunes a Mamba-MoE language model on this machine: NF4 base, LoRA adapters, MLX.",
        epilog=EXIT_CODES,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=16),
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, module in COMMANDS.items():
        sub = commands.add_parser(name, help=module.HELP, description=module.HELP, epilog=EXIT_CODES)
        module.arguments(sub)
        sub.add_argument("--json", action="store_true", help="one JSON object on standard output, for machines")
    return top


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code. Expected failures are one line on standard error, bugs a traceback."""
    args = parser().parse_args(argv)
    command = COMMANDS[args.command]
    if hasattr(command, "FLOW"):
        signals.interrupt_on_term()
    try:
        facts = command.run(args)
        _print(facts, command, args.json)
        return ExitCode.DONE
    except BrokenPipeError:
        # The reader of our output is gone (`magellano info | head -1`): nobody is left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.FAILED
    except KeyboardInterrupt:  # a training has its own way to stop
        if not hasattr(command, "FLOW"):
            return _fail("interrupted", ExitCode.FAILED)
        signals.hold_off()
        return _fail("stopped; the next start continues from the finished stages", ExitCode.RESUMABLE)
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        if code is ExitCode.RESUMABLE:
            signals.hold_off()  # what Prefect started is ended yet: a second signal must not change the exit code
        return _fail(str(error) or type(error).__name__, code)


def _print(facts: dict[str, Any], command: Any, as_json: bool) -> None:
    if as_json:
        print(json.dumps(facts, indent=2, ensure_ascii=False))
    else:
        from rich.console import Console

        command.show(facts, Console())
    sys.stdout.flush()


def exit_code(error: BaseException) -> ExitCode | None:
    """The exit code of a failure that is no bug; None for a bug, which deserves its traceback."""
    if isinstance(error, InputError | OutOfMemory | Stopped | DiskFull | Aborted):
        return error.exit_code
    if isinstance(error, MemoryError) or _is_mlx_out_of_memory(error):
        return ExitCode.OUT_OF_MEMORY
    if isinstance(error, FloatingPointError) or (isinstance(error, OSError) and error.errno in _EXPECTED):
        return ExitCode.FAILED
    return None


_EXPECTED = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}


def _is_mlx_out_of_memory(error: BaseException) -> bool:
    """MLX has no exception of its own for it: "[malloc] Unable to allocate N bytes", "[metal::malloc] ..."."""
    from magellano import faults
    from magellano.names import Fault

    return isinstance(error, RuntimeError) and faults.of_text(str(error)) is Fault.MEMORY


def _fail(message: str, code: ExitCode) -> int:
    print("magellano: " + " ".join(message.split()), file=sys.stderr)
    return code


def run() -> NoReturn:
    """Entry point of `python -m magellano`."""
    sys.exit(main())


if __name__ == "__main__":
    run()
