"""Tables as terminal text and Markdown, and pictures that can be opened."""

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from magellano import report


def scores(loss: float, evenness: float | None = 0.9) -> dict[str, Any]:
    experts = [{"share": [0.7, 0.3], "evenness": 0.88}, {"share": [0.5, 0.5], "evenness": 1.0}]
    return {
        "loss": loss,
        "perplexity": 2.0**loss,
        "bits_per_byte": loss / 2,
        "accuracy": 1 / (1 + loss),
        "tokens": 1234,
        "bytes": 5678,
        "evenness": evenness,
        "experts": experts if evenness else [],
    }


def evaluation(**changes: Any) -> dict[str, Any]:
    return {
        "profile": "demo",
        "base": scores(4.0),
        "fine_tuned": scores(3.0),
        "verdict": {"improved": True, "loss_percent": 25.0, "perplexity_percent": 50.0, "text": "fine-tuned is better"},
        "samples": [{"prompt": "def f(x) [bold]", "truth": "a | b", "base": "c\nd", "fine_tuned": "x" * 300}],
        **changes,
    }


BOOKS = {
    "rows_read": 1500,
    "used": 1490,
    "duplicates": 3,
    "rejected": {"empty": 5, "no text": 2},
    "tokens_in": 9000,
    "trained": 6000,
    "context": 2000,
    "held_out": 900,
    "dropped": 100,
}


def run(tmp_path: Path) -> dict[str, Any]:
    (tmp_path / report.EVALUATION_JSON).write_text(json.dumps(evaluation()), encoding="utf-8")
    train = {"tokens_per_s": 1234.5, "peak_gib": 1.25, "steps": 20}
    return {
        "profile": "demo",
        "stages": [
            {"stage": "tokenize", "state": "reused", "seconds": 0.1, "path": "/t", "summary": {"accounting": BOOKS}},
            {"stage": "train", "state": "built", "seconds": 75.0, "path": "/r", "summary": train},
            {"stage": "evaluate", "state": "built", "seconds": 3.0, "path": str(tmp_path), "summary": {}},
        ],
    }


def terminal(show: Any, *args: Any, width: int = 200) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    show(*args, console)
    return console.export_text()


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split(" | ")]


def test_measures_compare_base_and_fine_tuned():
    table = report.measures(evaluation())
    assert ("loss (nats/token)", "4.0000", "3.0000", "-25.0 %") in table.rows
    assert ("perplexity", "16.00", "8.00", "-50.0 %") in table.rows
    assert ("bits per byte", "2.0000", "1.5000", "-25.0 %") in table.rows
    assert ("token accuracy", "20.00%", "25.00%", "+5.00 points") in table.rows
    assert "1,234" in table.title


def test_a_measure_that_there_is_not_has_no_row():
    table = report.measures(evaluation(base=scores(4.0, None), fine_tuned=scores(3.0, None)))
    assert [row[0] for row in table.rows] == ["loss (nats/token)", "perplexity", "bits per byte", "token accuracy"]


def test_markdown_has_one_line_a_row_whatever_the_text_holds():
    lines = report.samples(evaluation()).markdown().splitlines()
    assert lines[2:4] == ["| prompt | true completion | base | fine-tuned |", "| :-- | :-- | :-- | :-- |"]
    assert len(lines) == 5
    assert "a \\| b" in lines[4]
    assert "c d" in lines[4]


def test_terminal_shows_text_as_it_is_and_long_text_cut():
    text = terminal(lambda console: report.samples(evaluation()).show(console))
    assert "[bold]" in text
    assert "…" in text


def test_evaluation_page_has_verdict_tables_and_pictures():
    page = report.evaluation_markdown(evaluation())
    assert "**fine-tuned is better**" in page
    assert all(part in page for part in ("Held-out split", "Samples", "experts", report.LOSS_PNG, report.EXPERTS_PNG))


def test_the_end_of_a_run_in_a_terminal(tmp_path: Path):
    text = terminal(report.show_run, run(tmp_path))
    for part in (
        "6,000 trained + 2,000 prompts + 900 held out + 100 dropped",
        "1 min 15 s",
        "1,234",
        "1.25 GiB",
        "reused",
        "built",
        "3.0000",
        "fine-tuned is better",
        str(tmp_path),
    ):
        assert part in text


def test_paths_stay_whole_in_a_narrow_terminal(tmp_path: Path):
    assert str(tmp_path / report.LOSS_PNG) in terminal(report.show_run, run(tmp_path), width=40)


def test_the_end_of_a_run_as_markdown(tmp_path: Path):
    page = report.run_markdown(run(tmp_path))
    for part in (
        "# demo",
        "1 min 15 s",
        "| rows | 1,500 | 1,490 used + 5 rejected: empty + 2 rejected: no text + 3 duplicates |",
        "**fine-tuned is better**",
        str(tmp_path),
    ):
        assert part in page


FAULTS = [
    {"fault": "out of memory", "after_step": 1200, "told": "SIGABRT", "batch": 4, "accumulate": 1, "then": [2, 2]},
    {"fault": "GPU fault", "after_step": 1300, "told": "hang", "batch": 2, "accumulate": 2, "then": [2, 2]},
]


def test_faults_that_were_survived_are_told(tmp_path: Path):
    assert report.survived(run(tmp_path)) == []
    assert "Survived" not in terminal(report.show_run, run(tmp_path))
    faulty = run(tmp_path)
    faulty["stages"][1]["summary"]["faults"] = FAULTS
    (table,) = report.survived(faulty)
    assert [row[1:4] for row in table.rows] == [
        ("1,200", "out of memory", "micro-batches of 2 x 2 for 4 x 1, the same gradient"),
        ("1,300", "GPU fault", "once more"),
    ]
    for text in (terminal(report.show_run, faulty), report.run_markdown(faulty)):
        assert "micro-batches of 2 x 2 for 4 x 1, the same gradient" in text


def test_a_run_that_was_not_evaluated_still_has_its_table(tmp_path: Path):
    short = run(tmp_path)
    short["stages"] = short["stages"][:2]
    assert "1 min 15 s" in terminal(report.show_run, short)
    assert "1 min 15 s" in report.run_markdown(short)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.416, "0.42 s"),
        (12.34, "12.3 s"),
        (59.96, "1 min 00 s"),
        (65.2, "1 min 05 s"),
        (3600, "1 h 00 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_durations(seconds: float, text: str):
    assert report.duration(seconds) == text


TOOK = {"seconds": 65.2, "kwh": 0.0123, "estimated": True, "money": 0.0042, "currency": "USD", "how": "65 W assumed"}


def test_what_a_run_took_is_marked_where_it_is_an_estimate():
    assert report.took(TOOK) == "1 min 05 s, ~12.3 Wh, 0.0042 USD (65 W assumed)"
    told = {**TOOK, "estimated": False, "kwh": 2.5, "money": 12.345}
    assert report.took(told) == "1 min 05 s, 2.5 kWh, 12.35 USD (65 W assumed)"


def test_a_runs_page_ends_with_gate_lineage_and_cost(tmp_path: Path):
    stage = {"stage": "train", "state": "built", "seconds": 1.0, "path": str(tmp_path), "summary": {}, "key": "a" * 32}
    gate = {"release": "b" * 32, "decision": "kept aside", "reason": "it is worse"}
    run = {"profile": "demo", "run": 7, "stages": [{**stage, "made_from": ["tokenize/" + "c" * 32]}]}
    page = report.run_markdown({**run, "gate": gate, "took": TOOK})
    assert "bbbbbbbb kept aside: it is worse" in page
    assert "run 7 took 1 min 05 s, ~12.3 Wh" in page
    assert "| train | aaaaaaaa | tokenize cccccccc |" in page
    assert "kept aside" not in report.run_markdown(run)


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 << 30, "3.0 GiB"), (5 << 40, "5.0 TiB")]
)
def test_sizes(count: float, text: str):
    assert report.size(count) == text


METRICS = [{"step": 1, "loss": 4.0}, {"step": 2, "loss": 3.0}, {"step": 2, "held_out_loss": 3.5}]


def test_loss_picture_is_a_png_and_the_same_each_time(tmp_path: Path):
    for name in ("a.png", "b.png"):
        report.loss_picture(tmp_path / name, {"pretraining": METRICS, "fine-tuning": METRICS}, 4.0, 3.0)
    assert (tmp_path / "a.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_loss_picture_shows_the_curve(tmp_path: Path):
    """Another curve must give another picture."""
    report.loss_picture(tmp_path / "a.png", {"fine-tuning": METRICS}, 4.0, 3.0)
    report.loss_picture(tmp_path / "b.png", {"fine-tuning": [*METRICS, {"step": 3, "loss": 1.0}]}, 4.0, 3.0)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_experts_picture_with_and_without_moe_layers(tmp_path: Path):
    uses = scores(3.0)["experts"]
    report.experts_picture(tmp_path / "with.png", uses, uses)
    report.experts_picture(tmp_path / "without.png", [], [])
    assert all((tmp_path / name).stat().st_size > 1000 for name in ("with.png", "without.png"))


def test_metrics_cut_off_by_a_kill_are_read_up_to_there(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 4.0}\n{"step": 2, "lo', encoding="utf-8")
    assert report.read_metrics(path) == [{"step": 1, "loss": 4.0}]
