"""The comparison over years against sums made by hand, and the file of prices."""

import json
from pathlib import Path

import pytest

from magellano import cli, prices, tco
from magellano.errors import ExitCode, InputError

FILE = """
currency = "EUR"
kwh = 0.5
[machine]
name = "box"
price = 3000.0
years = 3.0
watts = 100.0
idle_watts = 10.0
other_per_year = 50.0
[[instance]]
name = "rented"
per_hour = 2.0
hours_ratio = 0.5
storage_per_month = 10.0
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "prices.toml"
    path.write_text(FILE, encoding="utf-8")
    return path


def test_against_sums_by_hand(file: Path) -> None:
    facts = tco.compare(prices.load(file), years=3, hours_per_day=4)
    box, rented = facts["options"]
    training, idle = 3 * 365 * 4, 3 * 365 * 20
    assert box["fixed"] == 3000 + 150
    assert box["running"] == pytest.approx(0.5 * (0.1 * training + 0.01 * idle))
    assert rented["fixed"] == 360
    assert rented["running"] == pytest.approx(2.0 * 0.5 * training)
    assert rented["ratio"] == pytest.approx(rented["total"] / box["total"])
    assert f"= {box['total']:,.0f}" in box["formula"]
    assert f"2 * {training:,} h * 0.5 + 10 * 36" in rented["formula"]
    even = tco.compare(prices.load(file), 3, rented["even_hours"])["options"]
    assert even[0]["total"] == pytest.approx(even[1]["total"])


def test_a_machine_that_never_pays(file: Path) -> None:
    file.write_text(FILE.replace("per_hour = 2.0", "per_hour = 0.01"))
    assert tco.compare(prices.load(file), 3, 4)["options"][1]["even_hours"] is None


def test_the_command_shows_formula_and_claim(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tco", "--prices", str(file), "--hours", "4", "--json"]) == ExitCode.DONE
    facts = json.loads(capsys.readouterr().out)
    assert (facts["claimed"]["machine"], facts["claimed"]["cloud"]) == (3200, 11770)
    hours = facts["claimed"]["cloud_hours_per_day"]["rented"]
    assert hours * 2.0 * 3 * 365 + 360 == pytest.approx(11770)
    assert cli.main(["tco"]) == ExitCode.DONE
    said = capsys.readouterr().out
    assert "W * 8,760 h" in said
    assert "3,200 against 11,770" in said


def test_the_owners_prices_come_first(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAGELLANO_HOME", str(tmp_path / "elsewhere"))
    assert prices.load().currency == "USD"
    monkeypatch.setenv("MAGELLANO_HOME", str(tmp_path))
    assert prices.load().currency == "EUR"


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("kwh = 0.5", "", "kwh"),
        ("kwh", "kw", "kw"),
        ("price = 3000.0", "price = -1.0", "machine.price"),
        ("[", "[[", "TOML"),
    ],
)
def test_what_is_no_prices_file(file: Path, old: str, new: str, said: str) -> None:
    file.write_text(FILE.replace(old, new, 1))
    with pytest.raises(InputError, match=said) as e:
        prices.load(file)
    assert str(file) in str(e.value)
    with pytest.raises(InputError, match="cannot be read"):
        prices.load(file.with_name("none.toml"))
