"""Progress: plain lines where there is no terminal, a bar where there is one."""

import io

from magellano.progress import Lines, Remaining, describe, shown, silent


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_lines_come_at_the_start_at_intervals_and_once_at_the_end() -> None:
    clock, out = iter([0.0, 0.0, 4.0, 11.0, 12.0, 13.0, 14.0]), io.StringIO()
    lines = Lines("train", out, interval=10.0, clock=lambda: next(clock))
    for done in (0, 1, 2, 3, 4):
        lines(done, 4, loss=1.5)
    lines(4, 4, loss=1.5)
    assert out.getvalue().splitlines() == [
        "train: 0/4  loss 1.5000",
        "train: 2/4  loss 1.5000",
        "train: 4/4  loss 1.5000",
    ]


def test_without_a_terminal_shown_prints_lines() -> None:
    out = io.StringIO()
    with shown("tokenize", out) as progress:
        progress(3, 3, rows=1200)
    assert out.getvalue() == "tokenize: 3/3  rows 1,200\n"


def test_on_a_terminal_shown_draws_a_bar_with_facts() -> None:
    out = Terminal()
    with shown("train", out) as progress:
        progress(2, 4, loss=0.5)
        progress(4, 4, loss=0.25)
    assert "train" in out.getvalue()
    assert "4/4" in out.getvalue()
    assert "loss 0.2500" in out.getvalue()


def test_facts_read_like_measures() -> None:
    facts = {"loss": 3.14159, "tokens_per_s": 12345.6, "peak_gib": 1.254, "model": "base", "rows": 1234}
    assert describe(facts) == "loss 3.1416  12,346 tokens/s  peak 1.25 GiB  model base  rows 1,234"


def test_silent_says_nothing(capsys) -> None:  # type: ignore[no-untyped-def]
    silent(1, 2, loss=1.0)
    assert capsys.readouterr() == ("", "")


def test_what_remains_follows_from_the_pace_since_the_first_news() -> None:
    clock = iter([100.0, 110.0, 120.0, 130.0, 140.0, 150.0])
    remaining = Remaining(lambda: next(clock))
    assert remaining(40, 100) == {}, "resumed: what was done before says nothing of the pace"
    assert remaining(45, 100) == {"ETA": "0:01:50"}
    assert remaining(50, 100) == {"ETA": "0:01:40"}
    assert remaining(20, 100) == {}, "set back"
    assert remaining(21, 100) == {"ETA": "0:13:10"}
    assert remaining(100, 100) == {}
