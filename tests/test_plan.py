"""The plan against what MLX counts while a step runs, against what the stages really write, and against itself."""

import gc
from pathlib import Path

import pytest

from magellano import layout, lora, memory, moments, plan
from magellano.backend import mx, on_gpu
from magellano.benchmark import synthetic
from magellano.errors import OutOfMemory
from magellano.names import Recompute
from magellano.profile import Profile, load_profile
from magellano.progress import silent
from magellano.stages import quantize
from magellano.trainer import Trainer

TINY = {"model.d_model": 40, "model.n_layers": 4, "model.d_ff": 72, "model.d_state": 4, "model.vocab_size": 300}
DORA = {
    "lora.kind": "dora", "lora.ranks": {}, "lora.targets": ["in_proj", "x_proj", "dt_proj", "out_proj", "w1", "w2"],
}  # fmt: skip
on_cpu = pytest.mark.skipif(on_gpu(), reason="a CPU's plan and peak; `magellano benchmark train` compares a GPU's")
PROFILES = ["demo", "phase1", "phase2", "phase3", "production3b"]


def tiny(**more: object) -> Profile:
    return load_profile("production3b", {**TINY, "train.recompute": "always", **more})


def sized(name: str, batch: int, seq_len: int, **more: object) -> Profile:
    return load_profile(name, {"train.batch": batch, "data.seq_len": seq_len, "train.recompute": "always", **more})


def measured(profile: Profile, folder: Path) -> int:
    """MLX's peak of a second step, beside what other tests left."""
    gc.collect()
    before = mx.get_active_memory()
    trainer = Trainer(synthetic.model(profile), profile.train, synthetic.tokens(folder, profile))
    trainer.one_step()
    mx.reset_peak_memory()
    trainer.one_step()
    return mx.get_peak_memory() - before


@on_cpu
@pytest.mark.parametrize(
    ("profile", "moment"),
    [
        (sized("demo", 1, 64), "loss"),
        (sized("demo", 4, 256), "backward of layer 7 (moe)"),
        (sized("demo", 2, 32, **{"train.accumulate": 2}), "loss"),
        (sized("demo", 1, 16, **{"lora.rank": 96, "model.vocab_size": 257}), "optimiser"),
        (sized("demo", 1, 16, **{"lora.rank": 96, "model.vocab_size": 257, "train.accumulate": 2}), "sum of the grad"),
        (sized("demo", 2, 128, **{"train.loss_chunk": 64, "model.vocab_size": 300}), "backward of layer"),
        (sized("demo", 4, 64, **{"quantize.embedding": False}), "loss"),
        (sized("phase1", 1, 32), "loss"),
        (sized("phase1", 4, 64, **{"train.state": "float16"}), "loss"),
        (sized("demo", 4, 256, **DORA), "backward of layer 7 (moe)"),
    ],
    ids=lambda value: value.name if isinstance(value, Profile) else value,
)
def test_the_plan_is_the_measured_peak(profile: Profile, moment: str, tmp_path: Path):
    planned = plan.fine_tune(profile, gpu=False)
    assert planned.total == pytest.approx(measured(profile, tmp_path), rel=0.1)
    assert planned.moment.startswith(moment)


@on_cpu
@pytest.mark.parametrize(("batch", "seq_len"), [(1, 96), (3, 200)])
def test_the_plan_of_a_tiny_profile_is_the_measured_peak(batch: int, seq_len: int, tmp_path: Path):
    profile = tiny(**{"train.batch": batch, "data.seq_len": seq_len, "lora.rank": 5})
    assert plan.fine_tune(profile, gpu=False).total == pytest.approx(measured(profile, tmp_path), rel=0.1)


@on_cpu
@pytest.mark.parametrize(
    "profile",
    [sized("demo", b, t, **{"train.recompute": "never"}) for b, t in ((1, 64), (4, 256))]
    + [sized("phase1", 1, 128, **{"train.recompute": "never"})],
    ids=lambda p: f"{p.name} {p.train.batch} x {p.data.seq_len}",
)
def test_kept_activations_are_planned(profile: Profile, tmp_path: Path):
    planned = plan.fine_tune(profile, gpu=False)
    assert planned.total == pytest.approx(measured(profile, tmp_path), rel=0.15)
    recomputed = profile.model_copy(update={"train": profile.train.model_copy(update={"recompute": Recompute.ALWAYS})})
    assert plan.fine_tune(recomputed, gpu=False).total < planned.total


@pytest.mark.parametrize("embedding", [True, False])
def test_weights_are_what_the_quantised_base_holds(embedding: bool, tmp_path: Path):
    profile = tiny(**{"quantize.embedding": embedding})
    parts = plan.fine_tune(profile, gpu=False).memory
    written = quantize.run(tmp_path, profile, None, silent)["bytes"]
    assert parts["weights in 4 bits"] + parts["their scales"] + parts["other weights"] == written


def test_adapters_are_what_training_starts_with():
    profile = tiny(**{"lora.rank_pattern": {"layers.1": 3, "layers.0-2.out_proj": 90}})
    start = lora.start(profile.model, profile.lora)
    planned = plan.fine_tune(profile, gpu=False)
    assert planned.memory["adapters"] == sum(value.nbytes for value in start.values())
    assert planned.trainable == sum(value.size for value in start.values())


def test_production3b_by_part_on_a_gpu():
    """Each number from its shapes by hand: D 2048, I 4096, F 8192, V 50,257, 30 Mamba and 9 MoE layers, rank 72."""
    profile = load_profile("production3b", {"train.batch": 1})
    p = plan.fine_tune(profile, gpu=True)
    r, D, I, F, V = 72, 2048, 4096, 8192, 50257
    mamba = r * (D + 2 * I) + r * (I + 48) + r * (16 + I) + r * (I + D)
    moe = 8 * 2 * r * (D + F)
    trainable = 30 * mamba + 9 * moe + r * (V + D)
    assert p.trainable == trainable
    assert p.memory["adapters"] == 4 * trainable
    assert p.memory["optimiser"] == 2 * 2 * trainable  # float16
    assert p.moment == "backward of layer 3 (moe)"  # of the first MoE layer, when nearly all gradients are there
    assert p.memory["gradients"] == 2 * (trainable - 3 * mamba - moe)  # bfloat16
    assert p.memory["layer inputs kept"] == 5 * 512 * D * 2  # of layers 0 to 3, and the gradient coming down
    assert p.memory["a weight, dense"] == 3 * F * D * 2  # one matrix of the experts of a part
    assert p.memory["weights in 4 bits"] == pytest.approx(p.parameters / 2, rel=0.01)


@pytest.mark.parametrize(
    ("name", "batch", "gpu", "gib"),
    [
        ("production3b", 4, True, 4.0),
        ("production3b", 1, True, 3.5),
        ("production3b", 1, False, 4.0),
        ("phase3", 4, True, 2.1e9 / plan.GIB),
        ("phase2", 4, True, 0.8),  # of 0.7 GB; all but 0.3 is what the loss of 512 rows needs
        ("phase3", 4, False, 2.1e9 / plan.GIB),
    ],
)
def test_profiles_keep_to_their_bounds(name: str, batch: int, gpu: bool, gib: float):
    assert plan.fine_tune(load_profile(name, {"train.batch": batch}), gpu).total <= gib * plan.GIB


def test_dora_adds_a_length_a_row_and_norms_to_each_pass():
    profiles = (sized("demo", 2, 64, **{**DORA, "lora.kind": kind}) for kind in ("lora", "dora"))
    plain, dora = (plan.fine_tune(profile, gpu=False) for profile in profiles)
    D, I, R, N, F = 160, 320, 10, 8, 320
    rows = 6 * (2 * I + (R + 2 * N) + I + D) + 2 * 4 * (F + D)
    assert dora.trainable - plain.trainable == rows
    assert dora.memory["squares of the base's rows"] == dora.memory["adapters"] - plain.memory["adapters"] == 4 * rows
    weights = 6 * (2 * I * D + (R + 2 * N) * I + R * I + I * D) + 2 * 4 * 2 * F * D
    assert dora.flops_per_step - plain.flops_per_step == 2 * 2 * 8 * weights, "rank 8, forward and again"


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("gpu", [False, True])
def test_more_tokens_need_more_memory_and_the_counts_add_up(name: str, gpu: bool):
    profile = load_profile(name, {"train.recompute": "always"})  # "auto" changes its mind with the size
    p = plan.fine_tune(profile, gpu)
    assert p.parameters == layout.count(profile.model)
    assert p.total == sum(p.memory.values()) == max(p.moments.values()) == p.moments[p.moment]
    # a forward pass alone needs 2 operations per active weight and token; half of the model is active at the least
    assert p.flops_per_step > p.tokens_per_step * p.parameters / profile.model.n_experts * profile.model.top_k
    sizes = [(1, 64), (1, 256), (1, 4096), (2, 4096), (16, 4096), (16, 65536)]
    plans = [plan.fine_tune(plan.resized(profile, *size), gpu) for size in sizes]
    totals = [plan.total for plan in plans]
    assert totals == sorted(totals)
    assert totals[-1] > 4 * totals[0]
    for moment in plans[0].moments:
        each = [p.moments[moment] for p in plans]
        assert each == sorted(each), moment


def test_activations_follow_the_compute_dtype():
    wide, narrow = (
        plan.fine_tune(sized("phase1", 32, 512, **{"train.compute": compute}), gpu=True).memory
        for compute in ("float32", "bfloat16")
    )
    assert wide["layer inputs kept"] == 2 * narrow["layer inputs kept"]
    assert narrow[moments.LAYER] < wide[moments.LAYER] <= 2 * narrow[moments.LAYER]
    assert wide["adapters"] == narrow["adapters"]


def test_the_largest_batch_and_length_are_the_last_that_fit():
    profile, limit = load_profile("production3b"), 12 << 30
    found = plan.largest(profile, True, limit)

    def fits(batch: int, seq_len: int) -> bool:
        return plan.fine_tune(plan.resized(profile, batch, seq_len), True).total <= limit

    length, step = profile.data.seq_len, plan.LENGTHS
    assert fits(found["batch"], length)
    assert not fits(found["batch"] + 1, length)
    assert fits(1, found["seq_len"])
    assert not fits(1, found["seq_len"] + step)
    assert plan.largest(profile, True, 1 << 30) == {"batch": 0, "seq_len": 0}


@on_cpu
def test_a_limit_is_met_by_a_smaller_chunk_of_the_loss(caplog: pytest.LogCaptureFixture):
    """On a CPU: phase1's loss is its largest moment."""
    full, least = (plan.fine_tune(sized("phase1", 1, 512, **{"train.loss_chunk": n}), False).total for n in (512, 64))
    between = sized("phase1", 1, 512, **{"memory.limit_gib": (full + least) / 2 / plan.GIB})
    before = mx.set_memory_limit(1 << 33)
    mx.set_memory_limit(before)
    with memory.hold(between) as (fitting, facts):
        held = mx.set_memory_limit(1 << 33)
        mx.set_memory_limit(held)
    assert fitting.train.loss_chunk == facts["loss_chunk"] in (256, 128)
    assert plan.fine_tune(fitting, False).total <= held == int(between.memory.limit_gib * plan.GIB)
    assert facts["planned_gib"] <= facts["held_gib"] == held / plan.GIB
    assert "train.loss_chunk 512 is taken as" in caplog.text
    assert mx.set_memory_limit(before) == before  # as it was, once the run is over


def test_a_limit_that_no_chunk_meets_is_refused():
    profile = sized("phase1", 1, 512, **{"memory.limit_gib": 0.1})
    said = r"phase1: training needs about 0\.\d+ GiB, memory\.limit_gib is 0\.1"
    with pytest.raises(OutOfMemory, match=said), memory.hold(profile):
        raise AssertionError("must not start")


@on_cpu
def test_without_a_limit_a_cpu_is_not_held():
    with memory.hold(tiny()) as (fitting, facts):
        assert fitting == tiny()
        assert facts["held_gib"] is None
        assert facts["planned_gib"] * plan.GIB == plan.fine_tune(tiny(), False).total
