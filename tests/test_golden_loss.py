"""Losses step by step against those of a version that is trusted: an optimisation must not change what is learned."""

import importlib.util
import json
from pathlib import Path

import pytest

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize(("what", "adapter"), [("pretrain", False), ("fine-tune", True)])
def test_the_loss_curve_is_the_golden_one(what: str, adapter: bool) -> None:
    spec = importlib.util.spec_from_file_location("make_loss", GOLDEN / "make_loss.py")
    assert spec is not None
    assert spec.loader is not None
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    golden = json.loads((GOLDEN / "loss.json").read_text())[what]
    found = make.losses(adapter)
    assert found == pytest.approx(golden, rel=1e-4)
    assert found[-1] < 0.95 * found[0], "nothing was learned, so the curve would hold nothing"
