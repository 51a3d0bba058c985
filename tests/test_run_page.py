"""A run's page: the adapter in force beside the new one, planned memory beside the peak, links."""

from pathlib import Path
from typing import Any

import pytest

from magellano import registry, run_page
from magellano.artifacts import ArtifactRef
from magellano.names import Decision, Stage
from magellano.registry import Entry, HeldOut

TOKENS, OLD, NEW = "1" * 32, "a" * 32, "b" * 32


def scores(loss: float) -> dict[str, Any]:
    return {"loss": loss, "perplexity": 2 * loss, "bits_per_byte": 1.0, "accuracy": 0.5, "tokens": 100, "evenness": 1.0}


def run(gate: dict[str, Any] | None = None, tokens: str = TOKENS, release: str = NEW) -> dict[str, Any]:
    trained = {"peak_gib": 1.1, "planned_gib": 1.0, "held_gib": None}
    stages = [(Stage.TOKENIZE, tokens, {}), (Stage.TRAIN, "2" * 32, trained), (Stage.CHECKPOINT, release, {})]
    return {
        "profile": "p", "gate": gate, "evaluation": {"base": scores(4.0), "fine_tuned": scores(2.0)},
        "stages": [{"stage": str(s), "key": k, "summary": m} for s, k, m in stages],
    }  # fmt: skip


@pytest.fixture
def promoted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGELLANO_HOME", str(tmp_path))
    entry = Entry(
        release=OLD, digest="d", run=1, decided="2026-11-25T00:00:00+00:00", decision=Decision.PROMOTED, reason="",
        made="", numbers={"candidate": scores(2.5), "base": scores(4.0), "held_out": TOKENS}, lineage={},
    )  # fmt: skip
    tokens = ArtifactRef(stage=Stage.TOKENIZE, key=TOKENS, digest="d", bytes=1)
    with registry.changed() as book:
        book.shelf("p").held_out = HeldOut(ref=tokens, since="now", split={})
        book.shelf("p").judge(entry)


def test_the_new_adapter_stands_beside_the_one_in_force(promoted: None) -> None:
    table = run_page.in_force(run())
    assert table.title == f"Against the adapter in force, {OLD[:8]}"
    loss = table.rows[0]
    assert loss == ("loss (nats/token)", "4.0000", "2.5000", "2.0000", "-50.0 %", "-20.0 %")
    assert [row[0] for row in table.rows] == [
        "loss (nats/token)", "perplexity", "bits per byte", "token accuracy", "expert evenness"
    ]  # fmt: skip


def test_what_was_measured_on_another_set_is_not_compared(promoted: None) -> None:
    assert run_page.in_force(run(tokens="3" * 32)).rows == ()
    assert run_page.in_force(run(release=OLD)).rows == (), "the new one is the one in force"


def test_a_gate_s_numbers_come_first(promoted: None) -> None:
    numbers = {"base": scores(4.0), "promoted": scores(3.0), "candidate": scores(1.5)}
    assert run_page.in_force(run({"numbers": numbers})).rows[0][2:] == ("3.0000", "1.5000", "-62.5 %", "-50.0 %")


def test_nothing_in_force_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGELLANO_HOME", str(tmp_path))
    assert run_page.in_force(run()).rows == ()


def test_plan_beside_peak_and_links() -> None:
    assert run_page.memory(run()).rows == (("train", "1.000", "1.100", "+10.0 %", "no limit"),)
    links = {f"{TOKENS} facts": "/artifacts/artifact/x", f"{TOKENS} report": "/artifacts/artifact/y"}
    assert run_page.pages(run(), links).rows == (
        ("tokenize", "[facts](/artifacts/artifact/x) [report](/artifacts/artifact/y)"),
    )
