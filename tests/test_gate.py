"""What the gate decides, margin by margin."""

from typing import Any

import pytest

from magellano import gate
from magellano.profile import GateConfig


def numbers(loss: float, accuracy: float = 0.5) -> dict[str, Any]:
    return {"loss": loss, "accuracy": accuracy}


BASE = numbers(4.0)
CASES: list[tuple[dict[str, float], dict[str, Any], dict[str, Any] | None, bool, str]] = [
    ({}, numbers(2.9), numbers(3.0), True, "3.33 % lower than the promoted adapter's 3.0000"),
    ({}, numbers(3.0), numbers(3.0), False, "0.00 % lower than the promoted adapter's"),
    ({}, numbers(3.1), numbers(3.0), False, "3.33 % higher than the promoted adapter's"),
    ({"min_gain_percent": 5.0}, numbers(2.9), numbers(3.0), False, "must be lower by more than 5 %"),
    ({"min_gain_percent": 3.0}, numbers(2.9), numbers(3.0), True, "must be lower by more than 3 %"),
    ({"min_gain_percent": -5.0}, numbers(3.1), numbers(3.0), True, "3.33 % higher than the promoted"),
    ({}, numbers(2.9, 0.494), numbers(3.0, 0.5), False, "token accuracy -0.60 points (may lose 0.5)"),
    ({}, numbers(2.9, 0.496), numbers(3.0, 0.5), True, "token accuracy -0.40 points"),
    ({"max_accuracy_drop": 1.0}, numbers(2.9, 0.494), numbers(3.0, 0.5), True, "may lose 1"),
    ({}, numbers(4.1), None, False, "2.50 % higher than the base's 4.0000"),
    ({}, numbers(4.1), numbers(5.0), False, "2.50 % higher than the base's 4.0000"),
    ({}, numbers(3.9), None, True, "2.50 % lower than the base's 4.0000"),
    ({"min_gain_on_base_percent": 3.0}, numbers(3.9), None, False, "must be lower by more than 3 %"),
]


@pytest.mark.parametrize(("margins", "candidate", "promoted", "passes", "said"), CASES)
def test_what_passes(
    margins: dict[str, float], candidate: dict[str, Any], promoted: dict[str, Any] | None, passes: bool, said: str
) -> None:
    decided, reason = gate.decide(GateConfig(**margins), candidate, promoted, BASE)  # type: ignore[arg-type]
    assert decided is passes, reason
    assert said in reason
    assert "\n" not in reason


def test_a_reason_for_no_names_what_failed_alone() -> None:
    _, reason = gate.decide(GateConfig(), numbers(2.9, 0.1), numbers(3.0), BASE)
    assert "token accuracy" in reason
    assert "lower than" not in reason
