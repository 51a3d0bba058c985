"""What the UI gets of a stage: facts as rows, pages with their pictures inside."""

import base64
from pathlib import Path

import pytest

from magellano import run_page
from magellano.artifacts import ArtifactRef
from magellano.names import Stage
from tasks import background
from tasks.publish import facts_table, pages, run_report

REF = ArtifactRef(stage=Stage.TRAIN, key="k", digest="d", bytes=1234567)


def test_facts_are_rows_nested_ones_by_dotted_name(tmp_path: Path) -> None:
    rows = facts_table({"loss": 1.23456789, "rows": {"train": 5}, "long": [1, 2]}, REF, tmp_path, reused=True)
    table = {row["fact"]: row["value"] for row in rows}
    assert table == {
        "loss": "1.23457", "rows.train": "5", "state": "reused", "key": "k", "digest": "d", "bytes": "1,234,567",
        "folder": str(tmp_path),
    }  # fmt: skip


def test_faults_that_were_survived_have_a_row_each(tmp_path: Path) -> None:
    fault = {"fault": "out of memory", "after_step": 7, "told": "SIGABRT", "batch": 4, "accumulate": 1, "then": [2, 2]}
    rows = facts_table({"faults": [fault]}, REF, tmp_path, reused=False)
    (told,) = (row["value"] for row in rows if row["fact"] == "survived 1")
    assert told == "after step 7, out of memory, micro-batches of 2 x 2 for 4 x 1, the same gradient, SIGABRT"


def test_pictures_stand_inside_their_page_and_the_others_after(tmp_path: Path) -> None:
    for name in ("loss", "other"):
        (tmp_path / f"{name}.png").write_bytes(name.encode())
    (tmp_path / "page.md").write_text("# Page\n![the loss](loss.png) ![gone](gone.png) ![far](https://x.org/a.png)\n")
    loss, other = (f"data:image/png;base64,{base64.b64encode(n).decode()}" for n in (b"loss", b"other"))
    expected = f"# Page\n![the loss]({loss}) ![gone](gone.png) ![far](https://x.org/a.png)\n\n\n![other]({other})"
    assert pages(tmp_path) == expected


def test_no_pages_no_text(tmp_path: Path) -> None:
    assert pages(tmp_path) == ""


def test_nothing_is_published_where_nobody_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(background, "attempt", lambda what, work: asked.append(what))
    monkeypatch.setattr(run_page, "markdown", lambda run, links: "a page")
    for url, expected in (("", []), ("http://127.0.0.1:4200/api", ["the run's report"])):
        monkeypatch.setenv("PREFECT_API_URL", url)
        run_report({"run": 1, "stages": []})
        assert asked == expected
