"""A context in a file: going on from it is going on without the file; foreign and damaged ones are refused."""

import stat
from pathlib import Path

import numpy as np
import pytest

from magellano import context, generate, loader
from magellano.backend import mx
from magellano.decode import flat
from magellano.errors import InputError
from magellano.generate import Context
from magellano.model import MagellanoLM, seeded
from magellano.sampling import Sampling
from tests import models
from tests.models import TINY

MODEL = bytes(range(32))
PROMPT = [5, 6, 7, 8, 9, 10, 11]


@pytest.fixture(scope="module")
def model() -> MagellanoLM:
    return MagellanoLM(TINY, seeded(3))


def test_a_context_is_extended_bit_by_bit_as_the_whole(model: MagellanoLM):
    whole = generate.begin(model, 299, PROMPT)
    parts = generate.begin(model, 299).extended(model, PROMPT[:3]).extended(model, []).extended(model, PROMPT[3:])
    assert parts.tokens == whole.tokens == (299, *PROMPT)
    for a, b in zip([whole.logits_BV, *flat(whole.state)], [parts.logits_BV, *flat(parts.state)], strict=True):
        assert mx.abs(a - b).max().item() <= 1e-5 * mx.abs(a).max().item()


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, seed=4, repetition_penalty=1.3)])
def test_going_on_from_a_file_is_going_on(tmp_path: Path, model: MagellanoLM, sampling: Sampling):
    here = generate.begin(model, 299, PROMPT)
    context.save(tmp_path / "s.safetensors", here, MODEL)
    there = context.load(tmp_path / "s.safetensors", model, MODEL)
    assert there.tokens == here.tokens
    for a, b in zip([here.logits_BV, *flat(here.state)], [there.logits_BV, *flat(there.state)], strict=True):
        assert a.dtype == b.dtype
        assert mx.array_equal(a, b).item()
    wanted = list(generate.generate(model, PROMPT, 299, 9, sampling))
    for _ in range(2):  # a context may be used again
        assert list(generate.continued(model, there, 299, 9, sampling)) == wanted
    later = there.extended(model, wanted)
    assert list(generate.continued(model, later, 299, 3)) == list(generate.generate(model, PROMPT + wanted, 299, 3))


def test_a_16_bit_state_comes_back(tmp_path: Path):
    model = MagellanoLM(TINY, seeded(3), mx.bfloat16)
    here = generate.begin(model, 299, PROMPT)
    context.save(tmp_path / "s.safetensors", here, MODEL)
    there = context.load(tmp_path / "s.safetensors", model, MODEL)
    assert list(generate.continued(model, there, 299, 5)) == list(generate.generate(model, PROMPT, 299, 5))
    with pytest.raises(InputError, match="as it computes here"):
        context.load(tmp_path / "s.safetensors", MagellanoLM(TINY, seeded(3)), MODEL)


def test_the_file_is_its_owners_alone_and_replaced_whole(tmp_path: Path, model: MagellanoLM):
    path = tmp_path / "s.safetensors"
    for prompt in (PROMPT, [1]):
        context.save(path, generate.begin(model, 299, prompt), MODEL)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert [p.name for p in tmp_path.iterdir()] == ["s.safetensors"]
        assert context.load(path, model, MODEL).tokens == (299, *prompt)


def test_size_does_not_grow_with_the_prompt_but_for_its_tokens(tmp_path: Path, model: MagellanoLM):
    sizes = []
    for length in (10, 510):
        path = tmp_path / f"{length}.safetensors"
        context.save(path, generate.begin(model, 299, [1] * length), MODEL)
        sizes.append(path.stat().st_size)
    assert sizes[1] - sizes[0] <= 500 * 4 + 16


def test_the_state_of_another_model_is_refused(tmp_path: Path, model: MagellanoLM):
    path = tmp_path / "s.safetensors"
    context.save(path, generate.begin(model, 299, PROMPT), MODEL)
    with pytest.raises(InputError, match="another model"):
        context.load(path, model, bytes(32))
    wider = MagellanoLM(TINY.model_copy(update={"d_state": 8}), seeded(3))
    with pytest.raises(InputError, match=r"not a state of this model.*layers\.\d\.scan"):
        context.load(path, wider, MODEL)
    with pytest.raises(InputError, match=r"layers\.4\.conv"):
        context.load(path, MagellanoLM(TINY.model_copy(update={"n_layers": 5}), seeded(3)), MODEL)


def test_damaged_states_are_refused(tmp_path: Path, model: MagellanoLM):
    here, path = generate.begin(model, 299, PROMPT), tmp_path / "s.safetensors"
    for tokens in ((299, 300), (-1,)):
        context.save(path, Context(tokens, here.state, here.logits_BV), MODEL)
        with pytest.raises(InputError, match="outside the vocabulary"):
            context.load(path, model, MODEL)
    context.save(path, Context(here.tokens, here.state, here.logits_BV * float("nan")), MODEL)
    with pytest.raises(InputError, match="not finite"):
        context.load(path, model, MODEL)
    data = path.read_bytes()
    path.write_bytes(data[:-5])
    with pytest.raises(InputError, match="damaged"):
        context.load(path, model, MODEL)
    link = tmp_path / "link.safetensors"
    link.symlink_to(path)
    with pytest.raises(InputError, match="symbolic link"):
        context.load(link, model, MODEL)


def test_places_that_cannot_be_written(tmp_path: Path, model: MagellanoLM):
    here = generate.begin(model, 299)
    with pytest.raises(InputError, match="ends in"):
        context.save(tmp_path / "state.bin", here, MODEL)
    with pytest.raises(InputError, match="folder"):
        context.save(tmp_path / "none" / "s.safetensors", here, MODEL)


def test_identity_is_of_what_the_model_is_made_of(tmp_path: Path):
    models.write(tmp_path / "a")
    models.write(tmp_path / "b")
    models.write(tmp_path / "c", seed=4)
    one, same, other = (context.identity([tmp_path / name]) for name in "abc")
    assert one == same != other
    (tmp_path / "a" / loader.CONFIG).write_text("{}")
    assert context.identity([tmp_path / "a"]) != one
    assert context.identity([tmp_path / "b", tmp_path / "c"]) != context.identity([tmp_path / "c", tmp_path / "b"])
    (tmp_path / "d").mkdir()
    with pytest.raises(InputError, match="no model"):
        context.identity([tmp_path / "d"])
    assert np.frombuffer(one, dtype=np.uint8).size == 32
