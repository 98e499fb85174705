"""Tests of the forms of a conversation that a chat template accepts. test_chat_templates.py has real templates."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from qlora_lite.data.chat.messages import Message
from qlora_lite.data.chat.template import ChatTemplate, Form, forms_for
from qlora_lite.errors import CheckpointError

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": "x"}}}
MESSAGES = [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [CALL]}]


class Templated:
    """A tokenizer whose chat template is a function of messages and options."""

    chat_template = "a function"

    def __init__(self, render: Callable[..., str]) -> None:
        self._render = render
        self.renderings = 0

    def apply_chat_template(self, conversation: Sequence[Message], **options: Any) -> str:
        self.renderings += 1
        text = "".join(f"<{message['role']}>{self._render(message, **options)}<end>" for message in conversation)
        return text + "<assistant>" * options["add_generation_prompt"]


def call_as_text(message: Any, **options: Any) -> str:
    calls = message.get("tool_calls") or ()
    return message.get("content", "") + "".join(one["function"]["name"] + one["function"]["arguments"] for one in calls)


def call_as_object(message: Any, **options: Any) -> str:
    calls = message.get("tool_calls") or ()
    return f"{message['content']}" + "".join(
        one["function"]["name"] + one["function"]["arguments"]["a"] for one in calls
    )


@pytest.mark.parametrize(("render", "expected"), [(call_as_text, 'f{"a": "x"}'), (call_as_object, "fx")])
@pytest.mark.parametrize("arguments", [{"a": "x"}, '{"a": "x"}'])
def test_a_call_is_handed_over_in_the_form_that_the_template_takes(
    render: Callable[..., str], expected: str, arguments: object
) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    template = ChatTemplate(Templated(render))
    (text,) = template.learned([MESSAGES[0], {**MESSAGES[1], "tool_calls": [call]}], [1], {})
    ((start, stop),) = text.spans
    assert text.text[start:stop] == f"{expected}<end>"


def test_the_form_that_was_taken_is_tried_first_the_next_time() -> None:
    tokenizer = Templated(call_as_text)
    template = ChatTemplate(tokenizer)
    template.learned(MESSAGES, [1], {})
    first, tokenizer.renderings = tokenizer.renderings, 0
    template.learned(MESSAGES, [1], {})
    assert tokenizer.renderings == 2 < first  # with marks and without


def test_reasoning_moves_between_its_field_and_the_content() -> None:
    inline = {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nso"}
    field = {"role": "assistant", "content": "so", "reasoning_content": "why"}
    assert Form(reasoning="field").of(inline) == field
    assert Form(reasoning="content").of(field) == inline
    assert Form().of(field) == field and [form.reasoning for form in forms_for([inline])][:1] == ["as given"]


def test_tools_that_the_template_does_not_write_are_an_error() -> None:
    tools = [{"type": "function", "function": {"name": "unheard_of"}}]
    with pytest.raises(CheckpointError, match="the chat template leaves out the tool 'unheard_of'"):
        ChatTemplate(Templated(call_as_text)).learned(MESSAGES, [1], {"tools": tools})


def test_what_a_template_raises_is_said_for_the_form_that_was_given() -> None:
    def refusing(message: Any, **options: Any) -> str:
        raise ValueError(f"no {message['role']} here")

    with pytest.raises(CheckpointError, match=r"refuses roles user, assistant \(ValueError: no user here\)"):
        ChatTemplate(Templated(refusing)).learned(MESSAGES, [1], {})


def test_the_longest_special_token_counts() -> None:
    template = ChatTemplate(Templated(call_as_text), ["<a>", "<a><b>", ""])
    assert [template.special_at("x<a><b>", position) for position in range(3)] == [0, 6, 0]


def test_private_characters_are_refused() -> None:
    with pytest.raises(CheckpointError, match="private use"):
        ChatTemplate(Templated(call_as_text)).learned([{"role": "assistant", "content": "\ue000"}], [0], {})


class Sourced:
    """A tokenizer that renders a source by transformers."""

    def __init__(self, source: object) -> None:
        self.chat_template, self.renderings = source, 0

    def apply_chat_template(self, conversation: Sequence[Message], **options: Any) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        self.renderings += 1
        options.setdefault("chat_template", self.chat_template)
        return str(render_jinja_template([conversation], **{**options, "tokenize": False})[0][0])


DATED = (
    "{{ strftime_now('%d %B %Y, %H:%M') }}{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}{% if fails %}{{ raise_exception('no') }}{% endif %}"
)
PLAIN = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


def test_the_date_is_the_one_that_is_set_and_today_by_default() -> None:
    import transformers.utils.chat_template_utils as templates

    before = templates.datetime
    days = {
        datetime.date(2024, 2, 29): "29 February 2024, 00:00",
        datetime.date(1999, 12, 31): "31 December 1999, 00:00",
    }
    for day, shown in days.items():
        template = ChatTemplate(Sourced(DATED), date=day)
        assert template.depends_on_date and template.date_written == day
        assert template.learned(PLAIN, [1], {})[0].text == f"{shown}<user>q<end><assistant>a<end>"
        assert template.prompt(PLAIN[:1], {}) == f"{shown}<user>q<end><assistant>"
        assert template.whole(PLAIN, [], {}).text.startswith(shown)
        with pytest.raises(CheckpointError, match="TemplateError: no"):
            template.learned(PLAIN, [1], {"fails": True})
        assert templates.datetime is before
    today = ChatTemplate(Sourced(DATED))
    assert today.date_written == datetime.date.today()
    assert today.prompt(PLAIN, {}).startswith(datetime.date.today().strftime("%d %B %Y, 00:00"))


def test_nothing_is_patched_for_a_template_without_a_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qlora_lite.data.chat.template.patched_template_date", None)
    template = ChatTemplate(Sourced(DATED.replace("strftime_now", "['2024'] | join")), date=datetime.date(1999, 1, 1))
    assert template.prompt(PLAIN[:1], {}).startswith("2024") and template.date_written is None


def test_tags_are_obeyed_in_the_source_that_is_used() -> None:
    start = "{% for m in messages %}<{{ m.role }}>"
    tagged = start + "{% if m.role == 'assistant' %}x{%- generation -%} {{ m.content }}{% endgeneration %}{% else %}"
    tagged += "{{ m.content }}{% endif %}<end>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"

    class Named(Sourced):
        def apply_chat_template(self, conversation: Sequence[Message], **options: Any) -> str:
            name = "tool_use" if options.get("tools") else "default"
            options.setdefault("chat_template", self.chat_template[name])
            return super().apply_chat_template(conversation, **options)

    untagged = tagged.replace("{%- generation -%} ", "").replace("{% endgeneration %}", "{% if tools %}f{% endif %}")
    for tokenizer, given, expected in (
        (Sourced(tagged), {}, "a<end>"),
        (Sourced(untagged), {}, "xa<end>"),
        (Named({"default": tagged, "tool_use": untagged}), {}, "a<end>"),
        (Named({"default": tagged, "tool_use": untagged}), {"tools": [{"function": {"name": "f"}}]}, "xaf<end>"),
    ):
        (text,) = ChatTemplate(tokenizer).learned(PLAIN, [1], given)
        assert [text.text[start:stop] for start, stop in text.spans] == [expected]


def test_prompts_are_handed_over_in_the_form_that_the_template_takes() -> None:
    result = {"role": "tool", "content": "r"}
    for render, called in ((call_as_text, 'f{"a": "x"}'), (call_as_object, "fx")):
        prompt = ChatTemplate(Templated(render)).prompt([*MESSAGES, result], {})
        assert prompt == f"<user>q<end><assistant>{called}<end><tool>r<end><assistant>"
        whole = ChatTemplate(Templated(render)).whole([*MESSAGES, result], [], {})
        assert f"{whole.text}<assistant>" == prompt
    with pytest.raises(CheckpointError, match="the chat template leaves out the tool 'unheard_of'"):
        ChatTemplate(Templated(call_as_text)).prompt(MESSAGES, {"tools": [{"function": {"name": "unheard_of"}}]})


def test_settings_of_the_tokenizer_are_no_variables() -> None:
    with pytest.raises(CheckpointError, match="add_generation_prompt, tokenize cannot be set for a chat template"):
        ChatTemplate(Templated(call_as_text)).learned(MESSAGES, [1], {"tokenize": True, "add_generation_prompt": 1})


@pytest.mark.parametrize("system", [[], [{"role": "system", "content": "s"}]])
def test_what_is_known_of_answers_does_not_depend_on_which_tools_there_are(system: list[Message]) -> None:
    tools = "{% for tool in tools %}{{ tool.function.name }}{% endfor %}"
    tokenizer = Sourced(
        DATED.replace("{% for", f"{tools}{{% for", 1).replace(
            "<end>", f"{{% if m.role == 'system' %}}{tools}{{% endif %}}<end>"
        )
    )
    template, renderings = ChatTemplate(tokenizer), []
    for number in range(3):
        tokenizer.renderings = 0
        template.learned([*system, *PLAIN], [1 + len(system)], {"tools": [{"function": {"name": f"tool_{number}"}}]})
        renderings.append(tokenizer.renderings)
    assert renderings[0] > renderings[1] == renderings[2] == 2


def test_numbers_of_calls_are_looked_for_in_prompts_and_whole_texts() -> None:
    call = {"function": {"name": "f", "arguments": {"a": "x", "b": 37}}}
    messages = [MESSAGES[0], {**MESSAGES[1], "content": "", "tool_calls": [call]}, {"role": "tool", "content": "r"}]
    template = ChatTemplate(Templated(call_as_object))
    for write in (template.prompt, lambda messages, given: template.whole(messages, (), given)):
        with pytest.raises(CheckpointError, match=r"leaves out messages\[1\].tool_calls\[0\].arguments.b$"):
            write(messages, {})
