"""What the gate decides, margin by margin."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from magellano import gate, registry
from magellano.artifacts import ArtifactRef, Store
from magellano.names import Decision, Stage
from magellano.profile import GateConfig, load_profile
from magellano.registry import Entry, HeldOut


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


def test_one_that_came_into_force_meanwhile_is_the_one_to_beat(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    monkeypatch.setenv("MAGELLANO_HOME", str(tmp_path))
    tokens = ArtifactRef(stage=Stage.TOKENIZE, key="tokens", digest="t", bytes=1)
    losses = {"old": 3.0, "rival": 2.0, "mine": 2.5}
    seen = []

    def promote(release: str) -> None:
        facts = {"digest": "", "run": 1, "decided": "", "reason": "", "made": "", "numbers": {}, "lineage": {}}
        with registry.changed() as book:
            book.shelf("demo").held_out = HeldOut(ref=tokens, since="", split={})
            book.shelf("demo").judge(Entry(release=release, decision=Decision.PROMOTED, **facts))  # type: ignore[arg-type]

    def measure(*arguments: Any) -> dict[str, Any]:
        in_force = arguments[5].current
        seen.append(in_force)
        if in_force == "old":
            promote("rival")
        return {"candidate": numbers(losses["mine"]), "promoted": numbers(losses[in_force]), "base": BASE}

    promote("old")
    monkeypatch.setattr(gate, "_measure", measure)
    monkeypatch.setattr(gate, "lineage", SimpleNamespace(inputs=lambda *_: {"tokens": tokens}, of=lambda *_: {}))
    mine = ArtifactRef(stage=Stage.CHECKPOINT, key="mine", digest="m", bytes=1)
    found = gate.judge(
        Store(tmp_path), load_profile("demo"), mine, mine, made="x", data={}, run=2, progress=lambda *_, **__: None
    )
    assert seen == ["old", "rival"]
    assert found["decision"] == Decision.KEPT_ASIDE
    assert registry.current("demo") == "rival"
