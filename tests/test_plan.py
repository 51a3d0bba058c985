"""The plan's bytes against what the stages really write, on a tiny model; its totals for the profiles that ship."""

from pathlib import Path

import pytest

from magellano import layout, lora, plan
from magellano.profile import Profile, load_profile
from magellano.progress import silent
from magellano.stages import quantize

TINY = {"model.d_model": 40, "model.n_layers": 4, "model.d_ff": 72, "model.d_state": 4, "model.vocab_size": 300}


def tiny(**more: object) -> Profile:
    return load_profile("production3b", {**TINY, **more})


@pytest.mark.parametrize("embedding", [True, False])
def test_weights_are_what_the_quantised_base_holds(embedding: bool, tmp_path: Path):
    profile = tiny(**{"quantize.embedding": embedding})
    memory = plan.fine_tune(profile, wide_compute=True).memory
    written = quantize.run(tmp_path, profile, None, silent)["bytes"]
    assert memory["weights in 4 bits"] + memory["their scales"] + memory["other weights"] == written


def test_adapters_are_what_training_starts_with():
    profile = tiny()
    memory = plan.fine_tune(profile, wide_compute=True).memory
    start = lora.start(profile.model, profile.lora)
    assert memory["adapters"] == memory["gradients"] == sum(value.nbytes for value in start.values())


def test_sixteen_bit_compute_halves_the_activations_alone():
    wide, narrow = (plan.fine_tune(tiny(), wide_compute=wide).memory for wide in (True, False))
    halved = {part for part in wide if wide[part] == 2 * narrow[part]}
    assert halved == {"layer inputs kept", "largest layer, recomputed", "largest weight, dequantised"}
    assert all(wide[part] == narrow[part] for part in set(wide) - halved)


@pytest.mark.parametrize("name", ["demo", "phase1", "phase2", "phase3", "production3b"])
def test_totals_of_the_profiles(name: str):
    profile = load_profile(name)
    p = plan.fine_tune(profile, wide_compute=True)
    assert p.parameters == layout.count(profile.model)
    assert p.total == sum(p.memory.values())
    # a forward pass alone needs 2 operations per active weight and token; half of the model is active at the least
    assert p.flops_per_step > p.tokens_per_step * p.parameters / profile.model.n_experts * profile.model.top_k


def test_production3b_fits_its_machine():
    """On a CPU with 24 GB; the weights take about half a byte each."""
    p = plan.fine_tune(load_profile("production3b"), wide_compute=True)
    assert p.total < 24e9
    assert p.memory["weights in 4 bits"] == pytest.approx(p.parameters / 2, rel=0.01)
