"""What the train stage refuses before it loads anything; the training itself is held by test_trainer.py."""

from pathlib import Path

import pytest

from magellano.errors import OutOfMemory
from magellano.profile import load_profile
from magellano.progress import silent
from magellano.stages import train


def test_a_run_larger_than_its_limit_is_refused(tmp_path: Path) -> None:
    profile = load_profile("demo", {"memory.limit_gib": 0.001})
    nowhere = tmp_path / "nowhere"
    with pytest.raises(OutOfMemory, match=r"demo: training needs about 0\.\d+ GiB, memory\.limit_gib is 0\.001"):
        train.run(tmp_path, profile, nowhere, nowhere, nowhere, nowhere, silent)
    assert not list(tmp_path.iterdir())
