"""The time of a step as the roofline has it: what bounds it, and how it follows sizes and ceilings."""

import math
from dataclasses import replace

import pytest

from magellano import plan, roofline
from magellano.errors import InputError
from magellano.profile import load_profile
from magellano.roofline import KNOWN, Machine

NOTHING_COSTS = Machine("ideal", True, math.inf, math.inf, math.inf, 0.0, None, "made up")


def test_products_alone_take_their_operations_over_their_rate():
    profile = load_profile("production3b", {"train.batch": 4})
    found = roofline.step(profile, replace(NOTHING_COSTS, matmul=500e12))
    expected = plan.fine_tune(profile, True).flops_per_step / (500e12 * roofline.GPU_EFFICIENCY)
    assert found.seconds == found.parts["products"] == pytest.approx(expected)


def test_a_gpu_overlaps_launches_with_work_and_a_cpu_does_not():
    profile = load_profile("demo")
    slow = replace(NOTHING_COSTS, matmul=1e12, launch=1e-3)
    on_gpu, on_cpu = (roofline.step(profile, replace(slow, gpu=gpu)) for gpu in (True, False))
    assert on_gpu.seconds == max(on_gpu.parts["launches"], on_gpu.parts["products"]) == on_gpu.parts["launches"]
    assert on_cpu.seconds == on_cpu.parts["launches"] + on_cpu.parts["products"]


@pytest.mark.parametrize("name", list(KNOWN))
def test_time_follows_tokens_and_micro_batches(name: str):
    def seconds(**sets: object) -> float:
        return roofline.step(load_profile("production3b", sets), KNOWN[name]).seconds

    once, larger = seconds(**{"train.batch": 4}), seconds(**{"train.batch": 16})
    assert 2.5 * once < larger < 4 * once  # weights are made dense once, whatever the batch
    # two micro-batches, but one optimiser step, whose launches are a tenth where launches bind
    assert 1.7 * once < seconds(**{"train.batch": 4, "train.accumulate": 2}) < 2 * once


def test_an_m4_is_bound_by_its_products_and_cannot_do_what_was_claimed():
    profile = load_profile("production3b")
    m4 = KNOWN["m4"]
    found = roofline.step(profile, m4)
    tokens = profile.train.batch * profile.data.seq_len / found.seconds
    assert max(found.parts, key=lambda part: found.parts[part]) == "products"
    assert 100 < tokens < 400
    needed = roofline.matmul_rate_for(profile, 2400)
    assert needed == pytest.approx(20e12, rel=0.2)
    assert needed > 4 * m4.matmul


def test_the_ceilings_of_this_machine_are_of_sane_size():
    found = roofline.measured()
    assert 1e8 < found.matmul < 1e16
    assert 1e8 < found.bandwidth < 1e14
    assert 1e6 < found.scan < 1e13
    assert 1e-7 < found.launch < 0.1
    assert found.memory is not None
    assert found.memory > 1 << 28


def test_an_unknown_machine_is_refused_by_name():
    with pytest.raises(InputError, match="--on m5: no such machine is known; one of m4, h100, h200"):
        roofline.machine_named("m5")


def test_the_reference_of_dpo_is_a_forward_more():
    """Measured: a step of DPO takes 1.73 to 1.75 times one of SFT of the same shape (benchmarks/LOG.md)."""
    pairs = {"data.format": "preference", "data.files": ["pairs.jsonl"], "train.objective": "dpo"}
    machine = Machine("two cores", False, 190e9, 25e9, 2e9, 186e-6, None, "made up")
    sft, dpo = (roofline.step(load_profile("demo", sets), machine) for sets in ({}, pairs))
    assert 1.25 * sft.seconds < dpo.seconds < 2 * sft.seconds
    assert dpo.parts["optimiser"] == sft.parts["optimiser"]
