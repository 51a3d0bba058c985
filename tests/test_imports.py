"""Imports point one way: flows -> tasks -> magellano -> magellano.ops -> kernels, read from the files themselves."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(p for folder in ("flows", "tasks", "magellano", "benchmarks") for p in (ROOT / folder).rglob("*.py"))
PREFECT = {"flows", "tasks"}
MLX = "magellano/backend.py"
HEAVY = {
    "datasets": "magellano/data",
    "pandas": "magellano/data",
    "pandera": "magellano/data",
    "matplotlib": "magellano/report.py",
    "lm_eval": "magellano/harness.py",
    "tensorboardX": "magellano/tensorboard.py",
}
OF_AN_EXTRA = {"magellano/harness.py": "magellano/commands/evaluate.py"}  # cannot be imported without it; who may do so


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever in it, also relatively and by `from package import module`."""
    package = list(path.relative_to(ROOT).with_suffix("").parts[:-1])
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) + 1 - node.level] if node.level else []
            module = ".".join([*parents, node.module or ""]).rstrip(".")
            found |= {module, *(f"{module}.{alias.name}" for alias in node.names)}
    return found


def reaches(path: Path, package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in imports(path))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_are_files_to_look_at():
    assert {"flows", "tasks", "magellano"} <= {name(p).split("/")[0] for p in FILES}
    assert reaches(ROOT / "flows/train.py", "prefect"), "the reader of imports sees them"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_imports_point_one_way(path):
    top = name(path).split("/")[0]
    forbidden = {"flows": ["tests", "benchmarks"], "tasks": ["flows", "tests"]}.get(top, ["flows", "tasks", "tests"])
    if name(path).startswith("magellano/ops/"):
        forbidden = [*forbidden, *above_ops()]
    for package in forbidden:
        assert not reaches(path, package), f"{name(path)} imports {package}, which stands above it"
    assert top in PREFECT or not reaches(path, "prefect"), f"{name(path)} imports prefect: only flows and tasks may"
    assert name(path) == MLX or not reaches(path, "mlx"), (
        f"{name(path)} imports mlx: from magellano.backend import mx, nn"
    )
    for package, where in HEAVY.items():
        fits = name(path).startswith((where, "magellano/stages/tokenize.py"))
        assert fits or not reaches(path, package), f"{name(path)} imports {package}: only {where} may"


@pytest.mark.parametrize("path", OF_AN_EXTRA)
def test_what_needs_an_extra_is_imported_by_one_command(path: str):
    module = path.removesuffix(".py").replace("/", ".")
    assert [name(p) for p in FILES if reaches(p, module)] == [OF_AN_EXTRA[path]]


def above_ops() -> list[str]:
    """The core's modules, but for what operations stand on: preparation, machine, errors, names, NF4 container."""
    below = {"backend", "errors", "info", "names", "nf4", "ops"}
    return [
        f"magellano.{p.stem}"
        for p in (ROOT / "magellano").iterdir()
        if p.stem not in {*below, "__init__", "__pycache__"}
    ]


def in_a_process_without(packages: set[str], code: str) -> str:
    block = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""
    done = subprocess.run([sys.executable, "-c", block + code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_core_works_without_the_pipelines_packages():
    modules = [
        ".".join(p.relative_to(ROOT).with_suffix("").parts)
        for p in FILES
        if name(p).startswith("magellano/") and p.stem not in {"__main__", "__init__"} and name(p) not in OF_AN_EXTRA
    ]
    code = f"import importlib\nfor name in {modules!r}: importlib.import_module(name)\nprint('fine')"
    absent = {"prefect", "datasets", "pandas", "pandera", "matplotlib", "lm_eval", "torch"}
    assert in_a_process_without(absent, code).endswith("fine\n")


def test_the_core_does_not_load_prefect():
    code = "import magellano, magellano.artifacts, magellano.cli\nprint('prefect' in sys.modules)"
    assert in_a_process_without(set(), code) == "False\n"
