"""Nothing is pickled or unpickled, in files or in Prefect's results: a pickle runs what it wants when it is read."""

import ast
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(p for folder in ("flows", "tasks", "magellano", "benchmarks") for p in (ROOT / folder).rglob("*.py"))
MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
CALLS = {"np.load", "numpy.load", "np.save", "numpy.save", "read_pickle", "to_pickle", "torch.load", "torch.save"}
SAFE = ("magellano/torch_file.py", "torch.load")  # with weights_only=True, which reads tensors and runs nothing
READERS = {"mx.load": "magellano/tensors.py", "safe_open": "magellano/headers.py magellano/data/shards.py"}


def wrong(text: str, name: str = "") -> list[str]:
    """What in a source could read or write a pickle, or reads tensors past the checks."""
    found = []
    for node in ast.walk(ast.parse(text)):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
        elif isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            safe = (name, called) == SAFE and any(ast.unparse(k) == "weights_only=True" for k in node.keywords)
            if safe:
                continue
            if called in CALLS or called.split(".")[-1] in CALLS or any(k.arg == "allow_pickle" for k in node.keywords):
                found.append(called)
            if called in READERS and name not in READERS[called].split():
                found.append(called)
            if called in {"__import__", "import_module", "importlib.import_module"} and node.args:
                modules = [ast.unparse(node.args[0]).strip("'\"")]
            if called in {"flow", "task"}:
                found += serializer(node, called)
        elif isinstance(node, ast.FunctionDef):
            found += [f"@{d.id}" for d in node.decorator_list if isinstance(d, ast.Name) and d.id in {"flow", "task"}]
        found += [m for m in modules if m.split(".")[0] in MODULES]
    return found


def serializer(node: ast.Call, called: str) -> list[str]:
    """Empty where @flow or @task says that results are JSON, itself or through `options`."""
    given = {k.arg: ast.unparse(k.value) for k in node.keywords}
    stated = given.get("result_serializer") == "'json'" or (given.get(None) or "").startswith("options(")
    return [] if stated else [f"{called} without result_serializer"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_source_can_read_a_pickle(path: Path) -> None:
    assert wrong(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()) == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from cloudpickle import loads",
        "torch.load('x', weights_only=True)",
        "x = __import__('pickle')",
        "importlib.import_module('dill')",
        "np.load('x')",
        "f(x, allow_pickle=False)",
        "frame.to_pickle('x')",
        "mx.load('x')",
        "safe_open('x')",
        "@flow\ndef f(): pass",
        "@flow(name='x')\ndef f(): pass",
        "@task(result_serializer='pickle')\ndef f(): pass",
        "@task(**other())\ndef f(): pass",
    ],
)
def test_it_would_be_seen(text: str) -> None:
    assert wrong(text)


def test_prefects_results_are_json_by_default_too() -> None:
    with (ROOT / "prefect.toml").open("rb") as f:
        assert tomllib.load(f)["results"]["default_serializer"] == "json"
    text = (ROOT / "tasks" / "stage.py").read_text(encoding="utf-8")
    options = next(n for n in ast.parse(text).body if isinstance(n, ast.FunctionDef) and n.name == "options")
    made = next(n for n in ast.walk(options) if isinstance(n, ast.Call) and ast.unparse(n.func) == "Options")
    assert serializer(made, "options") == []
