"""Tests of the forms of a conversation that a chat template accepts. test_chat_templates.py has real templates."""

from __future__ import annotations

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
