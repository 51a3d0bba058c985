"""Chat templates: what of a rendered conversation counts, what is refused, and what a template may not do."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from magellano.data import formats
from magellano.data.readers import contents
from magellano.data.shards import Shards
from magellano.data.template import END, MESSAGES, Template, Unfit
from magellano.errors import InputError
from magellano.names import DataFormat
from magellano.profile import DataConfig
from magellano.progress import silent
from magellano.stages import tokenize
from magellano.tokenizer import Tokenizer

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %}{% generation %} {{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
USER, ANSWER = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}


def said(template: Template, *messages: dict[str, Any], **more: Any) -> str:
    parts = formats.segments({"messages": list(messages), **more}, DataFormat.CHAT, template)
    return "".join((f"[[{s.text}]]" if s.counts else s.text) + "$" * s.ends for s in parts)


def config(tmp_path: Path, **facts: Any) -> Path:
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps(facts))
    return path


def test_chatml_with_its_end_spelled_out(tmp_path: Path) -> None:
    template = Template.read(config(tmp_path, chat_template=CHATML, eos_token="<|im_end|>"))
    start = "<|im_start|>user\nhi$\n<|im_start|>assistant\n"
    assert said(template, USER, ANSWER) == f"{start}[[hello]]$\n"
    twice = said(template, USER, ANSWER, USER, ANSWER)
    assert twice == f"{start}[[hello]]$\n{start}[[hello]]$\n"
    asked = said(template, USER | {"content": "<|im_end|>"}, ANSWER)
    assert asked.startswith("<|im_start|>user\n<|im_end|>$\n"), "in a message it is text"


def test_an_end_is_learnt_where_the_template_has_none() -> None:
    template = Template(CHATML, "t")
    assert said(template, USER, ANSWER).endswith("[[hello<|im_end|>\n]]$")


def test_variables_and_generation_marks(tmp_path: Path) -> None:
    several = [{"name": "rag", "template": "x"}, {"name": "default", "template": LLAMA2}]
    template = Template.read(config(tmp_path, chat_template=several, eos_token={"content": "</s>"}, bos_token="<s>"))
    assert said(template, USER, ANSWER, USER) == "[INST] hi [/INST][[ hello]]$[INST] hi [/INST]"
    with pytest.raises(Unfit, match=r"refused by the chat template \(only user and assistant\)"):
        said(template, {"role": "system", "content": "s"}, USER, ANSWER)


def test_tools_and_calls_reach_the_template() -> None:
    template = Template(
        "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments | tojson }}){% endfor %}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}",
        "t",
    )
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": '{"a": "<ü>"}'}]}
    text = said(template, USER, call, {"role": "tool", "content": "3"}, ANSWER, tools=[{"name": "add"}])
    assert text == '[{"name": "add"}]<user>hi<assistant>[[add({"a": "<ü>"})]]<tool>3<assistant>[[hello]]$'
    with pytest.raises(Unfit, match="leaves nothing"):
        said(Template(LLAMA2.replace("{{ eos_token }}", ""), "t"), USER, call)
    with pytest.raises(Unfit, match="tool call that the chat template leaves out"):
        said(Template(CHATML, "t"), USER, call | {"content": "Wait."})
    with pytest.raises(Unfit, match=r"has a tool that the chat template leaves out"):
        said(Template(CHATML, "t"), USER, ANSWER, tools=[{"type": "function", "function": {"name": "add"}}])
    text = "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}{{ m.tool_calls }}{% endif %}{% endfor %}"
    with pytest.raises(Unfit, match="a tool's answer that"):
        said(Template(text, "t"), USER, call, {"role": "tool", "content": "3"}, ANSWER)
    with pytest.raises(Unfit, match="NUL"):
        said(template, USER, call | {"tool_calls": [{"name": END}]}, ANSWER)


def test_calls_and_answers_have_their_ids() -> None:
    template = Template(
        "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}#{{ c.id }}"
        "{% endfor %}{% if m.role == 'tool' %}#{{ m.tool_call_id }}{{ m.name }}{% endif %}{% endfor %}",
        "t",
    )
    call = {"role": "assistant", "content": "", "tool_calls": [{"id": "x1", "function": {"name": "f"}}]}
    told = {"role": "tool", "content": "3", "tool_call_id": "x1", "name": "f", "id": 7}
    assert said(template, USER, call, told, ANSWER) == "hi[[f#x1]]3#x1f[[hello]]$"


# As Qwen 2.5 has it: tools in the system's turn, several answers of tools in one user's turn.
QWEN = (
    "{%- if tools %}{{- '<|im_start|>system\n# Tools\n<tools>' }}{%- for tool in tools %}{{- '\n' }}"
    "{{- tool | tojson }}{%- endfor %}{{- '\n</tools><|im_end|>\n' }}{%- endif %}{%- for message in messages %}"
    "{%- if message.role == 'assistant' %}{{- '<|im_start|>assistant' }}"
    "{%- if message.content %}{{- '\n' + message.content }}{%- endif %}{%- for tool_call in message.tool_calls %}"
    "{%- if tool_call.function is defined %}{%- set tool_call = tool_call.function %}{%- endif %}"
    '{{- \'\n<tool_call>\n{"name": "\' + tool_call.name + \'", "arguments": \' }}{{- tool_call.arguments | tojson }}'
    "{{- '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}{%- elif message.role == 'tool' %}"
    "{%- if loop.index0 == 0 or messages[loop.index0 - 1].role != 'tool' %}{{- '<|im_start|>user' }}{%- endif %}"
    "{{- '\n<tool_response>\n' + message.content + '\n</tool_response>' }}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{- '<|im_end|>\n' }}{%- endif %}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)


@pytest.mark.parametrize("template", [False, True])
def test_tool_calls_are_what_the_stage_trains_on(tmp_path: Path, template: bool) -> None:
    """From the file to the masks of the shards: calls and answers of the assistant count, the rest does not."""
    call = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
    rows = [
        {
            "tools": [{"type": "function", "function": {"name": "add"}}],
            "messages": [
                USER | {"content": f"hi {n}"},
                {"role": "assistant", "content": None, "tool_calls": [call, call]},
                {"role": "tool", "tool_call_id": "1", "content": "<1>"}, {"role": "tool", "content": "<2>"}, ANSWER,
            ],
        }
        for n in range(8)
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = str(config(tmp_path, chat_template=QWEN, eos_token="<|im_end|>")) if template else ""
    data = DataConfig(format="chat", files=(str(tmp_path / "a.jsonl"),), template=path, seq_len=512, held_out=0.3)
    out = tmp_path / "out"
    out.mkdir()
    assert tokenize.run(out, data, 300, silent)["accounting"]["used"] == 8
    split, tokenizer = Shards(out, "train"), Tokenizer(300)
    row = split.batch([0])
    size = int(np.flatnonzero(row.reset[0])[1])
    shown = [("$" if t == 299 else tokenizer.decode([t])) for t in row.targets[0, :size].tolist()]
    counted = "".join(c if w else "|" for c, w in zip(shown, row.weights[0, :size], strict=True))
    calls = '{"name": "add", "arguments": {"a": 1}}'
    wanted = [f"<tool_call>\n{calls}\n</tool_call>\n<tool_call>\n{calls}\n</tool_call>$", "hello$"]
    assert [part for part in counted.split("|") if part] == (wanted if template else [f"{calls}\n{calls}$", "hello$"])
    text = "".join(shown)
    assert '{"type": "function", "function": {"name": "add"}}' in text
    assert ("<tool_response>\n<1>\n</tool_response>\n<tool_response>\n<2>" in text) is template
    assert ("### Tool:\n<1>\n\n### Tool:\n<2>\n\n" in text) is not template


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("{{ messages[-1].content }}", "cannot be told from prompts"),
        ("{{ messages[0].nothing.more }}", "refused by the chat template"),
        ("{{ 'a' * 10**9 }}", "refused"),
        ("{{ 'a' * 1000000 }}", "repeated too often"),
        ("{{ '%1000000000d' % 1 }}", "is not for this"),
        ("{{ 10 ** 10000000 }}", "is not for this"),
        ("{% for i in range(1000000) %}a{% endfor %}", "refused"),
        (
            "{% for i in range(9999) %}{% for j in range(9999) %}{{ 'aaaaaaaaaaaaaaaaaaaa' }}{% endfor %}{% endfor %}",
            "MiB",
        ),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refused"),
        ("{{ messages.append(1) }}", "refused"),
        ("{% include '/etc/passwd' %}", "refused"),
        ("{{ 'a'.ljust(1000000000) }}", "refused"),
    ],
)
def test_templates_that_go_too_far(source: str, told: str) -> None:
    with pytest.raises(Unfit, match=told):
        said(Template(source, "t"), USER, ANSWER)


def test_too_many_messages_are_refused() -> None:
    with pytest.raises(Unfit, match=f"more than {MESSAGES} messages"):
        said(Template(CHATML, "t"), *[USER, ANSWER] * (MESSAGES // 2 + 1))


@pytest.mark.parametrize("text", ["{% for %}", "{{", "{% generation %}x", ""])
def test_what_is_no_template_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "a.jinja"
    path.write_text(text)
    with pytest.raises(InputError, match=r"a\.jinja: n.*; give a tokenizer_config\.json"):
        Template.read(path)
    with pytest.raises(InputError, match="no chat_template in it"):
        Template.read(config(tmp_path, eos_token="x"))


def test_the_stage_trains_on_the_answers_and_lists_what_the_template_refuses(tmp_path: Path) -> None:
    rows = [{"messages": [USER | {"content": f"hi {i}"}, ANSWER]} for i in range(12)]
    rows.append({"messages": [{"role": "system", "content": "s"}, USER, ANSWER]})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    path = config(tmp_path, chat_template=LLAMA2, eos_token="</s>")
    data = DataConfig(format="chat", files=(str(tmp_path / "a.jsonl"),), template=str(path), seq_len=64, held_out=0.3)
    out = tmp_path / "out"
    out.mkdir()
    books = tokenize.run(out, data, 300, silent)["accounting"]
    assert (books["rows_read"], books["used"]) == (13, 12)
    assert list(books["rejected"]) == ["messages is refused by the chat template (only user and assistant)"]
    before = contents(data)
    path.write_text(json.dumps({"chat_template": LLAMA2 + " ", "eos_token": "</s>"}))
    assert [n for (n, d), (_, e) in zip(before, contents(data), strict=True) if d != e] == ["chat template"]


def test_a_template_without_conversations_is_refused() -> None:
    with pytest.raises(ValueError, match="template is for conversations"):
        DataConfig(files=("a",), template="t.jinja")
