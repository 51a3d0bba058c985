"""Several data sets: shares as the weights say, nothing left out, books by source, the same mix every time."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magellano import pipeline, toml
from magellano.data import mixing, readers, shards
from magellano.data.shards import Shards
from magellano.errors import InputError
from magellano.names import Stage
from magellano.profile import DataConfig, load_profile
from magellano.progress import silent
from magellano.stages import tokenize


def test_slots_are_the_weights_shares_and_hold_every_row() -> None:
    assert mixing.slots([10, 10], [1, 1], "ab") == [10, 10]
    assert mixing.slots([10, 10], [3, 1], "ab") == [30, 10]
    assert mixing.slots([100, 10], [1, 1], "ab") == [100, 100]
    assert mixing.slots([7, 3, 5], [0.5, 0.25, 0.25], "abc") == [10, 5, 5]
    with pytest.raises(InputError, match=r"sources: b: no row of it"):
        mixing.slots([1, 0], [1, 1], "ab")
    with pytest.raises(InputError, match="times as long as the data"):
        mixing.slots([100, 100], [1, 1e5], "ab")


def test_an_epoch_repeats_whole_sources_and_draws_the_rest_by_the_seed() -> None:
    places = [np.array([0, 2, 4]), np.array([1, 3])]
    first = mixing.epoch(places, [4, 7], seed=5)
    counts = Counter(first.tolist())
    assert sorted(counts[row] for row in (0, 2, 4)) == [1, 1, 2]
    assert sorted(counts[row] for row in (1, 3)) == [3, 4]
    assert np.array_equal(first, mixing.epoch(places, [4, 7], seed=5))
    drawn = {tuple(mixing.epoch([np.arange(50)], [60], seed)[50:].tolist()) for seed in range(3)}
    assert len(drawn) == 3


def lines(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    prose = [{"text": f"aaaa {i:3}"} for i in range(90)]
    pairs = [{"prompt": f"q{i:3}", "completion": "bbbb"} for i in range(30)]
    more = [{"text": "aaaa   0"}, {"text": 3}, {"text": ""}, *({"text": f"cccc {i:3}"} for i in range(40))]
    return DataConfig.model_validate({
        "sources": [
            {"name": "prose", "weight": 1, "files": [lines(tmp_path / "a.jsonl", prose)]},
            {"name": "pairs", "weight": 2, "files": [lines(tmp_path / "b.jsonl", pairs)], "format": "completions"},
            {"name": "more", "weight": 1, "files": [lines(tmp_path / "c.jsonl", more)]},
        ],
        "seq_len": 18, "held_out": 0.2,
    })  # fmt: skip


def test_books_by_source_balance_and_an_epoch_is_mixed(config: DataConfig, tmp_path: Path) -> None:
    outs = [tmp_path / "one", tmp_path / "two"]
    for out in outs:
        out.mkdir()
        books = tokenize.run(out, config, 300, silent)["accounting"]
    assert (outs[0] / "tokens.json").read_bytes() == (outs[1] / "tokens.json").read_bytes()
    own = books["sources"]
    assert list(own) == ["prose", "pairs", "more"]
    for part in own.values():
        assert part["rows_read"] == part["used"] + part["duplicates"] + sum(part["rejected"].values())
        assert part["tokens_in"] == part["trained"] + part["context"] + part["held_out"] + part["dropped"]
    assert (own["more"]["duplicates"], sum(own["more"]["rejected"].values())) == (1, 2)
    for key in ("rows_read", "used", "duplicates", "tokens_in", "trained", "context", "held_out"):
        assert books[key] == sum(part[key] for part in own.values()), key

    train, held_out = Shards(outs[0], "train"), Shards(outs[0], "held_out")
    stored = train.facts["rows"]["train"]
    seen = train.batch(range(train.rows)).tokens
    assert train.rows > stored
    assert held_out.rows == train.facts["rows"]["held_out"]
    which = Counter(next(c for c in (97, 98, 99) if bytes([c]).decode() in _text(row)) for row in seen)
    assert which[98] == pytest.approx(train.rows / 2, abs=1)
    assert which[97] == pytest.approx(train.rows / 4, abs=1)
    assert len(np.unique(seen, axis=0)) == stored, "every row is in an epoch"
    again = shards.indices(0, train.rows, train.rows, seed=1)
    assert np.array_equal(train.batch(again[:8]).tokens, Shards(outs[1], "train").batch(again[:8]).tokens)


def _text(row: np.ndarray) -> str:
    from magellano.tokenizer import Tokenizer

    return Tokenizer(300).decode(row.tolist())


def test_a_damaged_mix_is_refused(config: DataConfig, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    tokenize.run(out, config, 300, silent)
    facts = json.loads((out / "tokens.json").read_text())
    for wrong in (
        {"slots": [1, 1, 1]},
        {"shards": [0]},
        {"slots": [10**9] * 3},
        {"slots": None},
        {"shards": [0, 0, 0]},
    ):
        (out / "tokens.json").write_text(json.dumps(facts | {"mix": facts["mix"] | wrong}))
        with pytest.raises(InputError, match="how its sources mix is damaged"):
            Shards(out, "train")


def test_sources_are_part_of_the_key_and_their_places_are_not(config: DataConfig) -> None:
    def settings(**changes: Any) -> Any:
        sources = tuple(source.model_copy(update=changes) for source in config.sources)
        return pipeline.settings(Stage.TOKENIZE, load_profile("demo"), config.model_copy(update={"sources": sources}))

    assert settings() == settings(files=("elsewhere.jsonl",))
    assert settings() != settings(weight=3.0)
    assert "sources" not in pipeline.settings(Stage.TOKENIZE, load_profile("demo"), load_profile("demo").data)["data"]
    assert [name for name, _ in readers.contents(config)] == ["prose: a.jsonl", "pairs: b.jsonl", "more: c.jsonl"]


@pytest.mark.parametrize(
    ("sources", "said"),
    [
        ([{"name": "a", "files": ["x"]}, {"name": "a", "files": ["y"]}], "two have the same name"),
        ([{"name": "a"}], "sources: a: exactly one of files and hub"),
        ([{"name": "a", "files": ["x"], "weight": 0}], r"sources\.0\.weight: Input should be greater than 0"),
        ([{"name": "a", "files": ["x"], "wieght": 1}], r"sources\.0\.wieght: Extra inputs"),
        ([{"files": ["x"]}], r"sources\.0\.name: this key is required"),
    ],
)
def test_wrong_sources_are_refused(sources: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(InputError, match=said):
        load_profile("demo", {"data.files": [], "data.sources": sources})
    with pytest.raises(InputError, match="exactly one of files and hub, or else sources"):
        load_profile("demo", {"data.sources": [{"name": "a", "files": ["x"]}]})


def test_a_profile_with_sources_is_written_and_read(tmp_path: Path, config: DataConfig) -> None:
    import tomllib

    table = config.model_dump(mode="json")
    assert DataConfig.model_validate(tomllib.loads(toml.dumps(table))) == config
