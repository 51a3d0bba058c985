"""The commands of `magellano`, in the order in which its help lists them.

A command is a module with
    HELP                          one line
    arguments(parser)             its own arguments; --json is added for all
    run(args) -> dict             does it; what it returns is what --json prints
    show(facts, console)          prints the same for a reader
and imports what is heavy inside `run`.
"""

from types import ModuleType

from magellano.commands import benchmark, evaluate, export, fuse, generate, import_, info, plan, pretrain, train

COMMANDS: dict[str, ModuleType] = {
    "info": info,
    "plan": plan,
    "train": train,
    "pretrain": pretrain,
    "evaluate": evaluate,
    "generate": generate,
    "export": export,
    "import": import_,
    "fuse": fuse,
    "benchmark": benchmark,
}
