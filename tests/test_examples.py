"""Each example runs as a user runs it, from another folder, with tiny sizes, and says what it should."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


def run(name: str, *args: str, cwd: Path) -> str:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(EXAMPLES / f"{name}.py"), *args]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first example leaves."""
    home = tmp_path_factory.mktemp("examples")
    said = run("finetune_dataframe", "out", "12", cwd=home)
    (home / "said").write_text(said)
    return home / "out" / "model"


def test_every_example_has_its_test():
    assert {p.stem for p in EXAMPLES.glob("*.py")} == set(re.findall(r'run\("(\w+)"', Path(__file__).read_text()))


def test_a_dataframe_is_fine_tuned_on(model: Path):
    said = (model.parent.parent / "said").read_text()
    before, after = map(float, re.search(r"held-out loss ([\d.]+) -> ([\d.]+)", said).groups())
    assert after < before - 1, said
    read, used, duplicates = map(int, re.search(r"rows read (\d+) = used (\d+) .* duplicates (\d+)", said).groups())
    assert read == used + duplicates > 1000, said


def test_generate(model: Path):
    said = run("generate", str(model), "12 + 30 =", "1 + 1 =", cwd=model)
    assert said.count("[12 + 30 =]") == 2
    assert said.count("[1 + 1 =]") == 1
    assert "goes on as before: True" in said


def test_import_a_mamba(tmp_path: Path):
    for package in ("transformers", "torch", "tokenizers"):
        pytest.importorskip(package, reason="pip install -r requirements-peers.lock")
    said = run("import_mamba", cwd=tmp_path)
    assert re.search(r"logits differ by \d\.\de-\d\d at most", said)
    assert said.count("M parameters") == 2


def test_import_a_mamba_says_what_it_lacks(tmp_path: Path):
    path = str(EXAMPLES / "import_mamba.py")
    code = f"import sys, runpy; sys.modules['transformers'] = None; runpy.run_path({path!r})"
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.endswith("is not installed: pip install -r requirements-peers.lock\n")


def test_add_an_operation(tmp_path: Path):
    said = run("add_operation", cwd=tmp_path)
    assert said.count("output and gradient as in float64") == 4
