"""Generation: each way of choosing a token against its definition, the loop against the full forward of a model."""

import gc
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from magellano import decode, lora, nf4
from magellano.backend import mx, on_gpu
from magellano.benchmark import generate as benchmark
from magellano.completion import text
from magellano.decode import flat
from magellano.errors import InputError
from magellano.generate import PROMPT_CHUNK, Sampling, Stream, choose, generate, prompt_chunk, read
from magellano.layout import ParamSpec, parameters
from magellano.mamba import MambaState
from magellano.model import MagellanoLM, seeded
from magellano.ops import launch
from magellano.ops.launch import Dialect
from magellano.profile import LoraConfig, ModelConfig, load_profile

END = 60
TINY = ModelConfig(d_model=16, n_layers=4, n_experts=4, d_ff=24, d_state=4, dt_rank=3, vocab_size=257)
WHOLE = ModelConfig(d_model=64, n_layers=4, n_experts=4, d_ff=128, d_state=4, dt_rank=4, vocab_size=257)  # in blocks


@pytest.fixture(scope="module")
def model() -> MagellanoLM:
    return MagellanoLM(TINY, seeded(3))


class Scripted:
    """A model that always wants the token after the last one, and remembers what it was fed, unless it is compiled."""

    def __init__(self, vocabulary: int = 64):
        self.vocabulary, self.fed = vocabulary, []

    def initial_state(self, batch: int) -> Any:
        return [MambaState(mx.zeros((batch, 3, 1)), mx.zeros((batch, 1)))]

    def advance(self, tokens_BT: mx.array, state: Any) -> tuple[mx.array, Any]:
        if not launch.traced(tokens_BT):
            self.fed += tokens_BT[0].tolist()
        wanted_BT = (tokens_BT + 1) % self.vocabulary
        return (wanted_BT[..., None] == mx.arange(self.vocabulary)).astype(mx.float32), state

    def logits(self, h: mx.array) -> mx.array:
        return h

    def decoder(self) -> Any:
        return self

    def serves(self, batch: int) -> bool:
        return True

    def __call__(self, tokens_B: mx.array, state: Any) -> tuple[mx.array, Any]:
        h_B1V, state = self.advance(tokens_B[:, None], state)
        return h_B1V[:, 0], state


def quantized(config: ModelConfig, base: Callable[[ParamSpec], Any]) -> MagellanoLM:
    """In NF4 with an adapter whose every B is away from zero."""

    def source(spec: ParamSpec) -> Any:
        w = base(spec)
        if spec.target is None:
            return w
        return nf4.NF4Stack.of([nf4.quantize(x) for x in w]) if w.ndim == 3 else nf4.quantize(w)

    made = MagellanoLM(config, source)
    settings, rng = LoraConfig(rank=4), np.random.default_rng(1)
    start = lora.start(config, settings)
    lora.attach(made, settings, {k: mx.array(rng.normal(0, 0.1, v.shape).astype(np.float32)) for k, v in start.items()})
    return made


@pytest.fixture(params=["dense", "adapted", "adapted, odd", "adapted, small made dense", "adapted, odd, made dense"])
def any_model(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MagellanoLM:
    """Every way in which a decoder reads weights: dense, from the codes, by rows that are no whole blocks, merged."""
    if "made dense" not in request.param:
        monkeypatch.setattr(decode, "_SMALL", 0)
    config = TINY if "odd" in request.param or request.param == "dense" else WHOLE
    return MagellanoLM(config, seeded(3)) if request.param == "dense" else quantized(config, seeded(3))


@pytest.fixture(params=["reference", "host", "fibers"])
def anywhere(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param != "reference" and Dialect.HOST not in launch.available():
        pytest.skip("the host dialect cannot run here")
    with launch.on_fibers() if request.param == "fibers" else launch.use(request.param), launch.poisoned():
        yield request.param


@pytest.mark.parametrize("batch", [1, 3])
def test_a_decoder_is_the_full_forward(any_model: MagellanoLM, batch: int, anywhere: str) -> None:
    tokens = mx.array(np.random.default_rng(batch).integers(0, 257, (batch, 5)))
    full = any_model(tokens)
    decoder, state = any_model.decoder(), any_model.initial_state(batch)
    before = [(a.shape, a.dtype) for a in flat(state)]
    for t in range(5):
        logits_BV, state = decoder(tokens[:, t], state)
        assert logits_BV.dtype == mx.float32
        assert mx.abs(logits_BV - full[:, t]).max().item() <= 2e-5 * mx.abs(full).max().item(), f"token {t}"
        assert [(a.shape, a.dtype) for a in flat(state)] == before


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_k=20, top_p=0.9, seed=5)])
@pytest.mark.parametrize("serves", [True, False])
def test_a_compiled_step_that_runs_ahead_makes_the_same_tokens(
    sampling: Sampling, serves: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, with the reference in the kernels' place, for compiled host kernels there are none."""
    monkeypatch.setattr(decode, "_SMALL", 0)
    with launch.use(Dialect.REFERENCE):
        model = quantized(WHOLE, seeded(3))
        wanted = list(generate(model, [5, 6, 7], 256, 9, sampling))
        monkeypatch.setattr(launch, "gpu_geometry", lambda: True)
        monkeypatch.setattr(decode.Decoder, "serves", lambda self, batch: serves)
        assert list(generate(model, [5, 6, 7], 256, 9, sampling)) == wanted
    assert len(wanted) == 9


def test_streams_in_lock_step_are_streams_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = quantized(WHOLE, seeded(3)), [[256, 1, 2], [256, 9, 8], [256, 30, 0]]
    alone = [list(generate(model, prompt[1:], 256, 6)) for prompt in prompts]
    assert len({tuple(tokens) for tokens in alone}) == 3
    for rows in (1, 3):  # by the whole forward's products, and by those of few rows
        stream = Stream(model, Sampling())
        monkeypatch.setattr(stream.decoder, "rows", rows)
        made, together = stream.start(*read(prompts, model)), []
        for _ in range(6):
            together.append(np.array(made.token_P)[:3].tolist())
            made = stream.next(made)
        assert np.array(together).T.tolist() == alone


@pytest.mark.parametrize("length", [5, 8, 20])
def test_a_prompt_in_chunks_is_a_prompt_at_once(length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = quantized(WHOLE, seeded(3))
    prompt = np.random.default_rng(2).integers(0, 257, (2, length)).tolist()
    whole, at_once = read(prompt, model)
    for name in ("PROMPT_CHUNK", "GPU_PROMPT_CHUNK"):
        monkeypatch.setattr(f"magellano.generate.{name}", 8)
    pieces, state = read(prompt, model)
    assert whole.shape == (2, 257)
    for a, b in zip([whole, *flat(at_once)], [pieces, *flat(state)], strict=True):
        assert mx.abs(a - b).max().item() <= 1e-5 * mx.abs(a).max().item()


def test_memory_does_not_grow_with_the_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PROMPT_CHUNK", "GPU_PROMPT_CHUNK"):
        monkeypatch.setattr(f"magellano.generate.{name}", 64)
    # A GPU frees what a chunk's launches used while the next ones run: prompt and vocabulary must be large beside that.
    config, longest = (WHOLE.model_copy(update={"vocab_size": 1 << 15}), 1 << 16) if on_gpu() else (TINY, 4096)
    model, peaks = MagellanoLM(config, seeded(3)), []
    for length in (64, 64, 128, longest):
        gc.collect()
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(read([[7] * length], model)[0])
        peaks.append(mx.get_peak_memory() - before)
    logits, whole = 64 * config.vocab_size * 4, longest * config.d_model * 4  # of a chunk; hidden states of the prompt
    assert peaks[3] - peaks[2] < whole / 4
    assert peaks[2] - peaks[1] < logits


def test_a_state_keeps_nothing_alive_but_itself() -> None:
    model = MagellanoLM(TINY, seeded(3))
    mx.eval(model.parameters())
    read([[7] * PROMPT_CHUNK], model)  # what is made once is there
    before = mx.get_active_memory()
    state = flat(read([[7] * PROMPT_CHUNK], model)[1])
    inputs = PROMPT_CHUNK * TINY.d_inner * 4  # of one convolution
    assert mx.get_active_memory() - before <= sum(a.nbytes for a in state) + inputs / 2


@pytest.fixture(params=["step by step", "ahead"])
def ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways of a stream, whatever the device: a GPU's steps are compiled and run ahead."""
    monkeypatch.setattr(launch, "gpu_geometry", lambda: request.param == "ahead")
    return request.param == "ahead"


def test_document_starts_with_end_of_text_and_stops_at_it(ahead: bool):
    scripted = Scripted()
    assert list(generate(scripted, [7, END - 3], END, 10)) == [END - 2, END - 1]
    assert scripted.fed == [END, 7, END - 3, *([] if ahead else [END - 2, END - 1])]


def test_stops_at_max_tokens_without_a_step_too_many(ahead: bool, monkeypatch: pytest.MonkeyPatch):
    scripted, steps, step = Scripted(), [], Stream.next
    monkeypatch.setattr(Stream, "next", lambda self, made: steps.append(made) or step(self, made))
    assert list(generate(scripted, [1], END, 3)) == [2, 3, 4]
    assert scripted.fed == [END, 1, *([] if ahead else [2, 3])]
    assert len(steps) == 2


def test_an_empty_prompt_generates_from_the_start_of_a_document(ahead: bool):
    assert list(generate(Scripted(), [], END, 2)) == [END + 1, END + 2]


def test_greedy_is_the_full_forward(model: MagellanoLM):
    """Prompt longer than a chunk, so that the state crosses from chunk to chunk."""
    prompt = np.random.default_rng(0).integers(0, 256, prompt_chunk() + 20).tolist()
    made = list(generate(model, prompt, 256, 5))
    row = [256, *prompt]
    for token in made:
        assert int(mx.argmax(model(mx.array([row]))[0, -1]).item()) == token
        row.append(token)
    assert made


def test_same_seed_same_tokens_other_seed_other_tokens(model: MagellanoLM):
    def draw(seed: int) -> list[int]:
        return list(generate(model, [1, 2, 3], 256, 12, Sampling(temperature=1.0, seed=seed)))

    assert draw(1) == draw(1)
    assert len({tuple(draw(seed)) for seed in range(4)}) == 4


def frequencies(logits: list[float], sampling: Sampling, draws: int = 2000) -> np.ndarray:
    keys = mx.random.split(mx.random.key(0), draws)
    picked = [choose(mx.array(logits), sampling, keys[n]) for n in range(draws)]
    return np.bincount(np.array(mx.stack(picked)), minlength=len(logits)) / draws


def test_temperature_gives_the_softmax():
    logits = [0.0, 1.0, 2.0, -1.0]
    for temperature in (0.5, 1.0, 2.0):
        expected = np.exp(np.array(logits) / temperature)
        expected /= expected.sum()
        # 2000 draws: five standard deviations of the largest share are 0.056
        np.testing.assert_allclose(frequencies(logits, Sampling(temperature=temperature)), expected, atol=0.056)


def test_top_k_leaves_the_k_likeliest_in_their_proportion():
    got = frequencies([1.0, 3.0, 2.0, 0.0, -4.0], Sampling(temperature=1.0, top_k=2))
    assert got[[0, 3, 4]].sum() == 0
    assert got[1] == pytest.approx(1 / (1 + math.exp(-1)), abs=0.056)


@pytest.mark.parametrize(
    ("p", "kept"), [(0.05, [2]), (0.5, [2]), (0.55, [0, 2]), (0.85, [0, 2, 3]), (1.0, [0, 1, 2, 3])]
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p: float, kept: list[int]):
    logits = np.log([0.3, 0.05, 0.5, 0.15]).tolist()
    assert np.flatnonzero(frequencies(logits, Sampling(temperature=1.0, top_p=p))).tolist() == kept


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_impossible_settings_are_refused(wrong: dict[str, Any]):
    with pytest.raises(InputError, match=next(iter(wrong))):
        Sampling(**wrong)


def test_max_tokens_below_one_is_refused():
    with pytest.raises(InputError, match="max_tokens"):
        next(generate(Scripted(), [1], END, 0))


def test_text_holds_a_character_back_until_it_is_whole():
    pieces = {1: b"a", 2: b"\xc3", 3: b"\xa9b", 4: b"\xe2\x82"}
    assert list(text(iter([1, 2, 3, 4]), lambda ids: b"".join(pieces[i] for i in ids))) == ["a", "éb", "�"]


def test_the_benchmark_counts_what_a_token_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "_SMALL", 0)
    model = quantized(WHOLE, seeded(3))
    packed = adapters = plain = 0.0
    for spec in parameters(WHOLE):
        share = WHOLE.top_k / WHOLE.n_experts if len(spec.shape) == 3 and spec.target is not None else 1.0
        if spec.target is None:
            plain += 4 * spec.size
            continue
        *experts, outputs, inputs = spec.shape
        packed += spec.size * share * (1 / 2 + 1 / 64 + 4 / 64 / 256)
        adapters += 4 * 4 * (outputs + inputs) * math.prod(experts) * share
    found = model.decoder().reads()
    assert found["weights in 4 bits"] == pytest.approx(packed, rel=0.01)  # scales of scales are rounded up
    assert found["adapters"] == adapters
    assert found["dense weights"] == plain
    assert found["state"] == 2 * sum(a.nbytes for a in flat(model.initial_state(1)))


def test_the_benchmark_of_generation_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "LONG_CPU", 40)
    monkeypatch.setattr(benchmark, "LONG_GPU", 40)
    small = {"model.n_layers": 4, "model.d_model": 64, "model.d_ff": 64, "model.vocab_size": 300}
    facts = benchmark.run(load_profile("demo", small), steps=2)
    assert [row["position"] for row in facts["one stream"]] == [benchmark.SHORT, 40]
    assert facts["one stream"][0]["state_mib"] == facts["one stream"][1]["state_mib"] > 0
    assert {row["batch"] for row in facts["streams in lock-step"]} >= {1, 4}
    assert facts["bytes_a_token"] == sum(facts["bytes_a_token_by_part"].values())
    assert facts["tokens_per_s"] > 0
    assert facts["prefill_tokens_per_s"] > 0
