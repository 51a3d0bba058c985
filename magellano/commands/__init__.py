"""The commands of `magellano`, in the order in which its help lists them.

A command is a module with
    HELP                          one line
    arguments(parser)             its own arguments; --json is added for all
    run(args) -> dict             does it; what it returns is what --json prints
    show(facts, console)          prints the same for a reader
and imports what is heavy inside `run`.
"""

from types import ModuleType

from magellano.commands import (
    benchmark,
    diff,
    down,
    evaluate,
    export,
    fuse,
    gc,
    generate,
    import_,
    info,
    nightly,
    plan,
    pretrain,
    promote,
    rollback,
    runs,
    show,
    tco,
    train,
    up,
)

COMMANDS: dict[str, ModuleType] = {
    "info": info,
    "plan": plan,
    "train": train,
    "pretrain": pretrain,
    "nightly": nightly,
    "evaluate": evaluate,
    "generate": generate,
    "export": export,
    "import": import_,
    "fuse": fuse,
    "runs": runs,
    "show": show,
    "diff": diff,
    "promote": promote,
    "rollback": rollback,
    "gc": gc,
    "tco": tco,
    "up": up,
    "down": down,
    "benchmark": benchmark,
}
