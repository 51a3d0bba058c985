"""Text from tokens: stop strings, many prompts in lock-step, conversations; each against the same done alone."""

import numpy as np
import pytest

from magellano import generate
from magellano.backend import mx
from magellano.completion import Chat, Finish, Writer, complete, text
from magellano.data import formats
from magellano.data.formats import Role
from magellano.errors import InputError
from magellano.model import MagellanoLM, seeded
from magellano.sampling import Sampling
from magellano.tokenizer import Tokenizer
from tests.models import TINY

TOKENIZER = Tokenizer(TINY.vocab_size)
PROMPTS = ["one", "and a longer prompt", "", "x y z"]
DRAWN = Sampling(temperature=1.0, top_k=40, seed=5, repetition_penalty=1.2)


@pytest.fixture(scope="module")
def model() -> MagellanoLM:
    return MagellanoLM(TINY, seeded(3))


def letters(ids: object) -> bytes:
    return bytes(ids)  # type: ignore[call-overload]


def contexts(model: MagellanoLM, prompts: list[str]) -> list[generate.Context]:
    return [generate.begin(model, TOKENIZER.end_of_text, TOKENIZER.encode(prompt)) for prompt in prompts]


@pytest.mark.parametrize(
    ("said", "stops", "left"),
    [
        ("hello world", ["wor"], "hello "),
        ("hello world", ["nothing"], "hello world"),
        ("aab", ["ab"], "a"),
        ("abcabd", ["abd"], "abc"),
        ("hello wor", ["world"], "hello wor"),  # what was held back comes out at the end
        ("one two three", ["three", "two"], "one "),
        ("stop", ["s"], ""),
        ("über\u00e9t", ["ét"], "über"),
    ],
)
def test_text_ends_before_a_stop_string(said: str, stops: list[str], left: str):
    ids = list(said.encode())
    assert "".join(text(iter(ids), letters, stops)) == left
    for cut in range(len(ids)):  # whatever the tokens' borders
        tokens = [ids[:cut], ids[cut:]]
        assert "".join(text(iter([0, 1]), lambda n, tokens=tokens: bytes(tokens[n[0]]), stops)) == left


def test_no_token_is_asked_for_behind_a_stop():
    def endless():
        yield from b"abc"
        raise AssertionError("asked for more")

    assert "".join(text(endless(), letters, ["c"])) == "ab"


def test_text_is_told_as_soon_as_it_is_certain():
    writer = Writer(letters, ["end"])
    assert [writer.push(n) for n in b"an ene"] == ["a", "n", " ", "", "", "en"]
    assert writer.finish() == "e"


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InputError, match="stop"):
        Writer(letters, [""])


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(repetition_penalty=1.3), DRAWN])
def test_prompts_together_are_prompts_alone(model: MagellanoLM, sampling: Sampling):
    """Of different lengths; prompt n alone is the one with seed + n."""
    together = complete(model, TOKENIZER, contexts(model, PROMPTS), 12, sampling)
    for n, prompt in enumerate(PROMPTS):
        alone = complete(model, TOKENIZER, contexts(model, [prompt]), 12, sampling, number=n)[0]
        assert (together[n].tokens, together[n].text) == (alone.tokens, alone.text)
    assert len({tuple(one.tokens) for one in together}) == len(PROMPTS)
    assert all(one.finish is Finish.LENGTH for one in together)


def test_a_greedy_completion_is_the_full_forward(model: MagellanoLM):
    """With the penalty too, written down in NumPy."""
    for penalty in (1.0, 1.5):
        for prompt, made in zip(
            PROMPTS,
            complete(model, TOKENIZER, contexts(model, PROMPTS), 8, Sampling(repetition_penalty=penalty)),
            strict=True,
        ):
            row = [TOKENIZER.end_of_text, *TOKENIZER.encode(prompt)]
            for token in made.tokens:
                logits = np.array(model(mx.array([row]))[0, -1])
                had = sorted(set(row) - {TOKENIZER.end_of_text})
                logits[had] = np.where(logits[had] > 0, logits[had] / penalty, logits[had] * penalty)
                assert int(logits.argmax()) == token
                row.append(token)


def test_each_sequence_ends_on_its_own(model: MagellanoLM):
    free = complete(model, TOKENIZER, contexts(model, PROMPTS), 10, DRAWN)
    stop = free[1].text[2:5]
    assert stop
    cut = complete(model, TOKENIZER, contexts(model, PROMPTS), 10, DRAWN, [stop])
    for a, b in zip(free, cut, strict=True):
        assert b.text == a.text.split(stop)[0]
        assert b.finish is (Finish.STOP if stop in a.text else Finish.LENGTH)
        assert b.tokens == a.tokens[: len(b.tokens)]
    assert len(cut[1].tokens) < 10


def test_end_of_text_ends_one_and_not_the_others(model: MagellanoLM, monkeypatch: pytest.MonkeyPatch):
    free = complete(model, TOKENIZER, contexts(model, PROMPTS), 6, DRAWN)
    ends = next(t for t in free[0].tokens if all(t not in one.tokens for one in free[1:]))
    monkeypatch.setattr(TOKENIZER, "end_of_text", ends)  # the contexts below still start with the true one
    begun = [generate.begin(model, 299, TOKENIZER.encode(prompt)) for prompt in PROMPTS]
    made = complete(model, TOKENIZER, begun, 6, Sampling(1.0, 40, 1.0, 5, 0.0, 1.0))
    plain = [list(generate.continued(model, c, -1, 6, Sampling(1.0, 40, 1.0, 5 + n))) for n, c in enumerate(begun)]
    for one, whole in zip(made, plain, strict=True):
        assert one.tokens == (whole[: whole.index(ends)] if ends in whole else whole)
        assert one.finish is (Finish.END_OF_TEXT if ends in whole else Finish.LENGTH)


def test_a_conversation_reads_what_training_reads(model: MagellanoLM):
    chat = Chat(model, TOKENIZER, generate.begin(model, TOKENIZER.end_of_text))
    chat.say(Role.SYSTEM, "Be brief.")
    messages = [{"role": "system", "content": "Be brief."}]
    for turn in ("Hello", "And now?"):
        chat.say(Role.USER, turn)
        made = chat.answer(5, Sampling(temperature=1.0, seed=1))
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": made.text}]
        ids = [TOKENIZER.end_of_text]
        for part in formats.chat(messages):
            ids += TOKENIZER.encode(part.text) if part.text != made.text else made.tokens
            ids += [TOKENIZER.end_of_text] if part.ends else []
        messages[-1]["content"] = TOKENIZER.decode(made.tokens)
    # the first answer may be spelled by other tokens than its text: compare what both spell
    assert TOKENIZER.decode(chat.context.tokens) == TOKENIZER.decode(ids)
    assert chat.context.tokens.count(TOKENIZER.end_of_text) == 3
    whole = generate.begin(model, chat.context.tokens[0], chat.context.tokens[1:])
    assert mx.abs(whole.logits_BV - chat.context.logits_BV).max().item() <= 1e-5 * mx.abs(whole.logits_BV).max().item()


def test_an_answer_stops_where_the_user_would_speak(model: MagellanoLM):
    chat = Chat(model, TOKENIZER, generate.begin(model, TOKENIZER.end_of_text))
    assert formats.header(Role.USER) == Chat.STOP
    chat.say(Role.USER, "Hello")
    free = chat.answer(6, Sampling())
    again = Chat(model, TOKENIZER, generate.begin(model, TOKENIZER.end_of_text))
    again.say(Role.USER, "Hello")
    made = again.answer(6, Sampling(), [free.text[1:3]])
    assert made.finish is Finish.STOP
    assert made.text == free.text.split(free.text[1:3])[0]
    assert again.context.tokens[-1] == TOKENIZER.end_of_text
    assert TOKENIZER.decode(again.context.tokens).endswith(made.text)
