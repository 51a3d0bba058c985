"""A release of a run with a chat template: it holds the template, talks by it, and exports it."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from magellano import cli, generate, hf_tokenizer, lora, pipeline
from magellano.artifacts import Store
from magellano.completion import Finish
from magellano.data import formats, template
from magellano.data.shapes import Conversation, Message, Role
from magellano.data.template import END, Template
from magellano.model import MagellanoLM, seeded
from magellano.names import METRICS, DataFormat, Stage
from magellano.profile import load_profile
from magellano.progress import silent
from magellano.sampling import Sampling
from magellano.stages import checkpoint, quantize, tokenize
from magellano.templated import TemplatedChat
from magellano.tokenizer import Tokenizer
from tests import models
from tests.tiny import MODEL

CHATML = (
    "  {% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
STARTED = "\n{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
REWRITES = "{% for m in messages %}<{{ m.role }}> {{ m.content | trim }}.\n{% endfor %}"  # what was said is trimmed
TOKENIZER = Tokenizer(300)
USER = {"role": "user", "content": "hi"}


def config(folder: Path, source: str, eos: str | None) -> Path:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({"chat_template": source, "eos_token": eos}), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("templated")
    rows = [{"messages": [USER | {"content": f"hi {i}"}, {"role": "assistant", "content": "yes"}]} for i in range(9)]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"format": "chat", "files": [str(folder / "a.jsonl")], "held_out": 0.3, "seq_len": 64}
    text = MODEL + "[data]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in data.items())
    (folder / "tiny.toml").write_text(
        f'{text}template = "{config(folder, CHATML, "<|im_end|>")}"\n[train]\nsteps = 20\n'
    )
    profile, store = load_profile(folder / "tiny.toml"), Store(folder / "home")

    refs: dict[str, Any] = {}

    def build(stage: Stage, make: Any) -> Path:
        refs[stage] = store.build(stage, "key", version=1, inputs=refs, config={}, make=make).ref
        return store.path(refs[stage])

    def trained(out: Path) -> dict[str, Any]:
        lora.save(out, profile.model, profile.lora, models.adapter(profile.model, profile.lora))
        (out / METRICS).write_text('{"step": 1, "loss": 6.0}\n', encoding="utf-8")
        return {}

    tokens = build(Stage.TOKENIZE, lambda out: tokenize.run(out, profile.data, 300, silent))
    base = build(Stage.QUANTIZE, lambda out: quantize.run(out, profile, None, silent))
    adapter = build(Stage.TRAIN, trained)
    made = build(Stage.CHECKPOINT, lambda out: checkpoint.run(out, profile, adapter, base, tokens, {}))
    (folder / "tokenizer_config.json").unlink()
    return made


def test_the_release_holds_the_template_as_it_came(release: Path) -> None:
    kept = json.loads((release / template.FILE).read_text())
    assert kept == {"chat_template": CHATML, "eos_token": "<|im_end|>"}
    found = Template.kept(release)
    assert found is not None
    assert found.source == CHATML.replace("<|im_end|>", END)
    assert Template.kept(release.parent) is None


def test_tokens_from_before_it_was_kept_are_made_again() -> None:
    profile = load_profile("demo")
    with_template = profile.data.model_copy(update={"template": "t.jinja"})
    plain, kept = (pipeline.settings(Stage.TOKENIZE, profile, data) for data in (profile.data, with_template))
    assert "template" not in plain["data"]
    assert kept["data"] == plain["data"] | {"template": "kept"}


def test_generate_talks_by_it(release: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"hi\nand?\n")))
    assert cli.main(["generate", str(release), "--chat", "--max-tokens", "4", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)["messages"]
    assert [m["role"] for m in said] == ["user", "assistant"] * 2
    assert cli.main(["generate", str(release), "--chat", "--state", "x.safetensors"]) == 2
    assert "--chat: this release's chat template needs the messages" in capsys.readouterr().err


def test_an_export_has_it(release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for argv, wanted in (([], True), (["--no-chat"], False)):
        out = tmp_path / str(wanted)
        assert cli.main(["export", str(release), "--to", "mlx-lm", str(out), *argv, "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["chat_template"] is wanted
        written = json.loads((out / hf_tokenizer.CONFIG).read_text())
        assert ("chat_template" in written) is wanted
        if wanted:
            assert "<|im_end|>" not in written["chat_template"]
            assert written["chat_template"].count(hf_tokenizer.END) == 1


def test_a_fused_model_holds_it(release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fuse", str(release), str(tmp_path / "out"), "--bound", "9", "--json"]) == 0
    assert (tmp_path / "out" / template.FILE).read_bytes() == (release / template.FILE).read_bytes()
    capsys.readouterr()


def test_a_release_that_is_too_old_to_hold_it_says_so(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "old"
    old.mkdir()
    for path in release.iterdir():
        if path.name != template.FILE:
            (old / path.name).write_bytes(path.read_bytes())
    for argv in (["generate", str(old), "--chat"], ["export", str(old), "--to", "mlx-lm", str(tmp_path / "out")]):
        assert cli.main(argv) == 2
        assert "is too old to hold; magellano train tiny" in capsys.readouterr().err


@pytest.mark.parametrize(("source", "eos"), [(CHATML, "<|im_end|>"), (STARTED, "</s>"), (CHATML, None)])
def test_an_exported_template_renders_what_training_reads(source: str, eos: str | None, tmp_path: Path) -> None:
    """Set up as transformers has Jinja, where bos_token is a token of the exported tokenizer."""
    ours = Template.read(config(tmp_path, source, eos))
    theirs = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(
        hf_tokenizer.started(ours.spelled("<EOT>"))
    )
    messages = [USER, {"role": "assistant", "content": "yes"}, USER]
    said = Conversation(tuple(Message(Role(m["role"]), m["content"]) for m in messages))
    text = theirs.render(messages=messages, add_generation_prompt=True, bos_token="<EOT>", eos_token="<EOT>")
    assert text == "<EOT>" + ours.prompt(said).replace(END, "<EOT>")


def conversation(model: MagellanoLM, made: Template, turns: int = 2) -> tuple[TemplatedChat, list[dict[str, Any]]]:
    chat, messages = TemplatedChat(model, TOKENIZER, generate.begin(model, TOKENIZER.end_of_text), made), []
    for turn in range(turns):
        chat.say(Role.USER, f"hi {turn}")
        answer = chat.answer(5, Sampling(temperature=1.0, seed=turn))
        messages += [USER | {"content": f"hi {turn}"}, {"role": "assistant", "content": answer.text}]
    return chat, messages


@pytest.mark.parametrize(("source", "eos"), [(CHATML, "<|im_end|>"), (STARTED, "</s>")])
def test_a_conversation_reads_what_training_reads(source: str, eos: str, tmp_path: Path) -> None:
    made = Template.read(config(tmp_path, source, eos))
    chat, messages = conversation(MagellanoLM(models.TINY, seeded(3)), made)
    ids = [TOKENIZER.end_of_text]
    for part in formats.segments({"messages": messages}, DataFormat.CHAT, made):
        ids += TOKENIZER.encode(part.text) + [TOKENIZER.end_of_text] * part.ends
    # an answer may be spelled by other tokens than its text: compare what both spell
    assert TOKENIZER.decode(chat.context.tokens) == TOKENIZER.decode(ids)
    assert chat.context.tokens.count(TOKENIZER.end_of_text) == ids.count(TOKENIZER.end_of_text) == 5


def test_a_template_that_writes_turns_anew_has_them_read_again(tmp_path: Path) -> None:
    model, made = MagellanoLM(models.TINY, seeded(3)), Template.read(config(tmp_path, REWRITES, None))
    chat = TemplatedChat(model, TOKENIZER, generate.begin(model, TOKENIZER.end_of_text), made)
    chat.say(Role.USER, "hi")
    chat.say(Role.ASSISTANT, " yes ")
    chat.context, chat._read = chat.context.extended(model, TOKENIZER.encode("<user> hi.\n yes ")), "<user> hi.\n yes "
    chat.say(Role.USER, "and?")
    chat.answer(1, Sampling())
    assert TOKENIZER.decode(chat.context.tokens).startswith("<user> hi.\n<assistant> yes.\n<user> and?.\n")
    assert chat.context.tokens.count(TOKENIZER.end_of_text) == 1


def test_what_a_template_puts_behind_an_answer_ends_it() -> None:
    model = MagellanoLM(models.TINY, seeded(3))
    free, _ = conversation(model, Template("{% for m in messages %}{{ m.content }}{% endfor %}", "t"), 1)
    word = TOKENIZER.decode(free.context.tokens)[len("hi 0") :][1:3]
    ended = Template("{% for m in messages %}{{ m.content }}{% if m.role == 'assistant' %}" + word + "{% endif %}"
                     "{% endfor %}", "t")  # fmt: skip
    chat = TemplatedChat(model, TOKENIZER, generate.begin(model, TOKENIZER.end_of_text), ended)
    chat.say(Role.USER, "hi 0")
    made = chat.answer(5, Sampling(temperature=1.0, seed=0))
    assert made.finish is Finish.STOP
    assert TOKENIZER.decode(chat.context.tokens) == "hi 0" + made.text + word
