"""Energy from counters that a folder stands for, from a stand-in for nvidia-smi, and estimated where nobody tells."""

import os
from pathlib import Path

import pytest

from magellano import energy, prices
from magellano.energy import Meter


@pytest.fixture
def known() -> prices.Prices:
    return prices.load(prices.OURS)


def zone(powercap: Path, name: str, what: str, microjoules: int, most: int = 1_000_000_000) -> Path:
    folder = powercap / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(what + "\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    (folder / "energy_uj").write_text(f"{microjoules}\n")
    return folder / "energy_uj"


def test_packages_are_added_and_their_parts_are_not(tmp_path: Path, known: prices.Prices) -> None:
    first = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    second = zone(tmp_path, "intel-rapl:1", "package-1", 999_000_000)
    parts = [zone(tmp_path, "intel-rapl:0:0", "core", 0), zone(tmp_path, "intel-rapl:2", "psys", 0)]
    meter = Meter(tmp_path).start()
    first.write_text("41000000\n")  # 36 J
    second.write_text("35000000\n")  # starts again after 1,000 J: 1 + 35 J
    for part in parts:
        part.write_text("900000000\n")
    facts = meter.stop().facts(known)
    assert facts["kwh"] == pytest.approx(72 / 3.6e6)
    assert facts["by"] == {"processor": facts["kwh"]}
    assert facts["estimated"] is False
    assert facts["how"] == "processor told"


def test_without_counters_it_is_an_estimate_and_says_so(tmp_path: Path, known: prices.Prices) -> None:
    facts = Meter(tmp_path / "none").start().stop().facts(known)
    assert facts["estimated"] is True
    assert facts["how"] == f"estimate: {known.machine.watts:g} W assumed for the machine"
    assert facts["kwh"] == pytest.approx(known.machine.watts * facts["seconds"] / 3.6e6, rel=0.2, abs=1e-7)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_counter_that_may_not_be_read_is_an_estimate(tmp_path: Path, known: prices.Prices) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 1).chmod(0)
    assert Meter(tmp_path).start().stop().facts(known)["estimated"] is True


def test_a_gpu_is_not_the_machine(tmp_path: Path, known: prices.Prices) -> None:
    meter = Meter(tmp_path / "none", gpu_watts=lambda: 300.0).start()
    meter._looked -= 10  # ten seconds passed
    facts = meter.stop().facts(known)
    assert facts["by"]["gpu"] == pytest.approx(3000 / 3.6e6, rel=0.05)
    assert facts["estimated"] is True, "the rest of the machine is"
    assert "gpu told; estimate" in facts["how"]


def test_what_nvidia_smi_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    for says, watts in (("printf '310.5\\n12\\n'", 322.5), ("echo '[N/A]'", None), ("exit 9", None)):
        tool.write_text(f"#!/bin/sh\n{says}\n")
        tool.chmod(0o755)
        assert energy.nvidia_watts() == watts


def test_money_is_energy_and_the_machines_hours(known: prices.Prices) -> None:
    facts = energy.cost(7200.0, {"processor": 0.5}, known)
    machine = known.machine
    assert facts["money"] == pytest.approx(0.5 * known.kwh + 2 * machine.price / (machine.years * 8760))
    assert facts["watts"] == 250.0


def test_two_attempts_are_one_run(known: prices.Prices) -> None:
    a, b = energy.cost(10.0, {"processor": 1.0}, known), energy.cost(30.0, {"estimate": 2.0}, known)
    both = energy.added(a, b)
    assert (both["seconds"], both["kwh"], both["estimated"]) == (40.0, 3.0, True)
    assert both["by"] == {"processor": 1.0, "estimate": 2.0}
    assert both["money"] == pytest.approx(a["money"] + b["money"])
    assert energy.added(None, a) is a
