"""A profile whose whole fine-tune, base included, takes a second."""

from pathlib import Path

import pytest

TINY = """
[model]
d_model = 32
n_layers = 4
n_experts = 2
d_ff = 32
d_state = 4
dt_rank = 4
vocab_size = 300

[base]
source = "pretrain"

[data]
format = "completions"
files = ["builtin:python-docstrings"]
seq_len = 64
max_rows = 60
held_out = 0.2

[lora]
rank = 2

[train]
steps = 2
batch = 2
warmup = 1

[evaluate]
samples = 1
sample_tokens = 4
max_tokens = 256

[pretrain.data]
format = "text"
files = ["builtin:python-topics"]
seq_len = 64
max_rows = 40

[pretrain.train]
steps = 2
batch = 2
warmup = 1
"""


@pytest.fixture
def tiny(tmp_path: Path) -> str:
    """Path of the profile."""
    path = tmp_path / "tiny.toml"
    path.write_text(TINY, encoding="utf-8")
    return str(path)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty $MAGELLANO_HOME."""
    monkeypatch.setenv("MAGELLANO_HOME", str(tmp_path / "home"))
    return tmp_path / "home"
