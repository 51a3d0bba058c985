"""The layers of a step of decoding as one launch: what is recorded, run phase by phase in the GPU's geometry, gives
what the launches give; and its CUDA text compiles. On a CUDA GPU the launch itself.
"""

import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

from magellano import decode
from magellano.backend import mx
from magellano.decode import Decoder, flat
from magellano.errors import InputError
from magellano.model import MagellanoLM, seeded
from magellano.ops import chain, cuda, launch
from magellano.ops.around import Around
from magellano.ops.chain import Chain, Slot, columns
from magellano.ops.decode import matvec
from magellano.ops.launch import Dialect
from tests.test_generate import TINY, WHOLE, quantized

CUDA = Dialect.CUDA in launch.available()


def model_of(kind: str) -> MagellanoLM:
    return quantized(WHOLE, seeded(3)) if kind == "adapted" else MagellanoLM(TINY, seeded(3))


@pytest.fixture(autouse=True)
def from_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the smallest matrix are read from their codes, as in a model of full size."""
    monkeypatch.setattr(decode, "_SMALL", 1024)


@pytest.fixture
def gpu_geometry():  # type: ignore[no-untyped-def]
    if CUDA:
        yield
        return
    if Dialect.HOST not in launch.available():
        pytest.skip("the host dialect, which runs the phases, cannot run here")
    with launch.on_fibers(), launch.poisoned():
        yield


@pytest.mark.parametrize(("kind", "batch"), [("adapted", 3), ("dense", 1)])
def test_a_chained_decoder_is_the_one_of_single_launches(gpu_geometry: None, kind: str, batch: int) -> None:
    model = model_of(kind)
    tokens = mx.array(np.random.default_rng(batch).integers(0, 257, (batch, 4)))
    single, chained = Decoder(model, chained=False), Decoder(model, chained=True)
    assert (single.single, chained.single) == ("asked for", None)
    states = [model.initial_state(batch)] * 2
    for t in range(4):
        wanted, states[0] = single(tokens[:, t], states[0])
        found, states[1] = chained(tokens[:, t], states[1])
        for a, b in zip([wanted, *flat(states[0])], [found, *flat(states[1])], strict=True):
            assert a.dtype == b.dtype
            assert mx.abs(a - b).max().item() <= 1e-5 * mx.abs(a).max().item(), f"token {t}"


def chain_of(model: MagellanoLM, batch: int, monkeypatch: pytest.MonkeyPatch) -> Chain:
    seen: list[Chain] = []

    def noted(self: Chain, *arrays: mx.array) -> list[mx.array]:
        seen.append(self)
        return [mx.zeros(s.shape, s.dtype) for s in self.results]

    monkeypatch.setattr(Chain, "__call__", noted)
    Decoder(model, chained=True)(mx.zeros((batch,), mx.int32), model.initial_state(batch))
    (found,) = seen
    return found


def test_layers_are_so_many_phases_and_what_they_do_alike_is_there_once(
    gpu_geometry: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three Mamba layers of nine launches and one of experts of seven, of which two are alike."""
    text = chain_of(model_of("adapted"), 1, monkeypatch).source("k", 264)
    assert len(re.findall(r"^  phase_\d+\(", text, re.M)) == 3 * 9 + 7
    assert text.count("  k_all_here((") == 3 * 9 + 7 - 1, "the threadgroups wait between two phases, and only there"
    assert text.count("__noinline__ void phase_") == 9 + 7 - 2


@pytest.mark.parametrize("by", ["nvrtc", "nvcc"])
@pytest.mark.parametrize("batch", [1, 3])
def test_the_cuda_text_compiles_for_the_threadgroups_that_must_be_there_at_once(
    gpu_geometry: None, by: str, batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = chain_of(model_of("adapted"), batch, monkeypatch)
    if by == "nvrtc":
        try:
            cuda.toolkit()
        except InputError as e:
            pytest.skip(str(e))
        monkeypatch.setenv("MAGELLANO_CACHE", str(tmp_path))
        name, code = made.compiled(264, "sm_90")
        assert f".text.{name}\0".encode() in code
        return
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc here")
    path = tmp_path / "layers.cu"
    path.write_text(made.source("checked", 264))
    flags = ["-std=c++17", "-arch=sm_90", "-cubin", f"-maxrregcount={chain._REGISTERS}", "-Xptxas", "-v"]
    command = [nvcc, *flags, path, "-o", path.with_suffix(".cubin")]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout
    of_phase = r"properties for _Z\d+phase_.*\n\s+\d+ bytes stack frame, (\d+) bytes spill stores"
    spilled = [int(n) for n in re.findall(of_phase, done.stdout)]
    assert len(spilled) == 14, done.stdout
    assert max(spilled) <= 64, f"more than a function saves for its caller\n{done.stdout}"


def test_views_of_a_slot_lie_where_those_of_an_array_do() -> None:
    slot, array = Slot.whole(0, (2, 7), mx.float32), mx.arange(14).reshape(2, 7)
    flat_ = array.reshape(-1)
    for view in (
        lambda a: a,
        lambda a: columns(a, 3, 5)[1],
        lambda a: columns(a, 3)[1][:, None],
        lambda a: columns(a, 1)[0].squeeze(1),
        lambda a: a.reshape(7, -1),
        lambda a: a[:, None, :].squeeze(1).reshape(-1),
    ):
        found, wanted = view(slot), view(array)
        assert found.shape == wanted.shape
        assert mx.array_equal(mx.as_strided(flat_, found.shape, found.strides, found.first), wanted).item()


def test_what_a_chain_cannot_hold_is_refused(gpu_geometry: None) -> None:
    w, x = mx.ones((4, 8)), mx.ones((2, 8))
    with pytest.raises(TypeError):
        Chain("sum", lambda x: [matvec(x, w) + 1], [x])
    with pytest.raises(TypeError, match="float16"):
        Chain("cast", lambda x: [matvec(x, w).astype(mx.float16)], [x])
    with pytest.raises(AssertionError, match="threads"):
        chain_of_wrong_threads(x)
    assert Chain("product", lambda x: [matvec(x, w, None, Around())], [x]).phases


def chain_of_wrong_threads(x: mx.array) -> Chain:
    kernel = launch.Kernel("conv_step", ("x", "weight", "bias", "state"), ("y", "next"))
    how = {"template": {}, "grid": (32, 1, 1), "threadgroup": (32, 1, 1)}
    return Chain("odd", lambda x: kernel([x] * 4, **how, output_shapes=[(8,)] * 2, output_dtypes=[mx.float32] * 2), [x])


def test_why_a_decoder_launches_singly(monkeypatch: pytest.MonkeyPatch) -> None:
    model = MagellanoLM(TINY, seeded(3))
    if not CUDA:
        assert "dialect" in (Decoder(model).single or "")
    monkeypatch.setattr(decode.launch, "dialect", lambda: Dialect.CUDA)
    monkeypatch.setattr(decode.cuda, "architecture", lambda: "sm_75")
    assert "compute capability" in (decode._single(model) or "")
    monkeypatch.setattr(decode.cuda, "architecture", lambda: "sm_90")
    assert decode._single(model) is None
    monkeypatch.setenv("MLX_USE_CUDA_GRAPHS", "1")
    assert "graphs" in (decode._single(model) or "")
    monkeypatch.setenv("MLX_USE_CUDA_GRAPHS", "0")
    for change in ({"d_state": 5}, {"d_state": 128}, {"d_conv": 1}, {"dt_norm_eps": 1e-6},
                   {"n_experts": decode.CHAINED_EXPERTS + 1}):  # fmt: skip
        other = MagellanoLM(TINY.model_copy(update=change), seeded(3))
        assert decode._single(other), change


def test_layers_whose_adapters_differ_launch_singly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each form's phases have threadgroup memory of their own: three ranks are more than one kernel can have."""
    model = quantized(WHOLE, seeded(3))
    monkeypatch.setattr(decode.launch, "dialect", lambda: Dialect.CUDA)
    monkeypatch.setattr(decode.cuda, "architecture", lambda: "sm_90")
    monkeypatch.setenv("MLX_USE_CUDA_GRAPHS", "0")
    assert decode._single(model) is None
    first = model.backbone.layers[0].mixer.in_proj
    first.attach(first.lora_a[:2], first.lora_b[:, :2], first.lora_scale)
    assert "forms" in (decode._single(model) or "")
    monkeypatch.setattr(decode, "_SMALL", 1 << 19)  # all are made dense, their adapters in them
    assert decode._single(model) is None


def test_a_chain_is_for_arrays_of_one_type(gpu_geometry: None) -> None:
    model = model_of("dense")
    single, chained = Decoder(model, chained=False), Decoder(model, chained=True)
    states = [model.initial_state(1)]
    states.append([s and s._replace(conv_BKI=s.conv_BKI.astype(mx.float16)) for s in states[0]])
    for state in states:
        assert mx.allclose(chained(mx.array([7]), state)[0], single(mx.array([7]), state)[0], rtol=1e-5).item()
    assert len(chained._chains) == 2


@pytest.mark.skipif(not CUDA, reason="threadgroups wait for one another on a CUDA GPU alone")
def test_many_launches_leave_the_count_where_the_next_expects_it() -> None:
    model = quantized(WHOLE, seeded(3))
    decoder, state = Decoder(model, chained=True), model.initial_state(1)
    assert decoder.single is None
    for _ in range(200):
        logits, state = decoder(mx.array([5]), state)
    mx.eval(logits, flat(state))
    assert mx.isfinite(logits).all().item()
    blocks = chain._PER_PROCESSOR * cuda.processors()
    turn = chain._turn(blocks)
    assert int(turn[0].item()) % blocks == 0
    assert int(turn[0].item()) > 0
