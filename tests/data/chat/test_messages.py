"""Tests of the messages of a conversation: forms that are accepted, and the sentences for those that are not."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_lite.data.chat.messages import (
    checked_messages,
    is_learned,
    learned_messages,
    without_nulls,
    without_switches,
)
from qlora_lite.errors import CheckpointError, ConfigError


def test_null_columns_count_as_absent() -> None:
    call = {"id": None, "function": {"name": "f", "arguments": {"a": 1, "b": None}}}
    messages = [
        {"role": "user", "content": "a", "tool_calls": None, "name": None},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    expected = {"name": "f", "arguments": {"a": 1}}
    assert checked_messages(messages, "record 1") == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": expected}]},
    ]
    assert without_nulls({"a": [{"b": None, "c": 0}], "d": None}) == {"a": [{"c": 0}]}


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}])
def test_arguments_are_an_object_or_json_text(arguments: object) -> None:
    messages = [{"role": "assistant", "tool_calls": [{"name": "f", "arguments": arguments}]}]
    (message,) = checked_messages(messages, "record 1")
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": arguments}}]


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "user"}, r"record 1: messages\[1\] must be \{role, content\}"),
        ({"role": "user", "content": None}, r"messages\[1\].content must be a string, got NoneType"),
        ({"role": 3, "content": "a"}, r"messages\[1\].role must be a string, got int 3"),
        (
            {"role": "user", "content": [{"type": "video"}]},
            r"messages\[1\].content\[0\] must be a part of type text or i",
        ),
        ({"role": "user", "content": [{"type": "text"}]}, r"messages\[1\].content\[0\].text must be a string"),
        ({"role": "assistant", "tool_calls": {"a": 1}}, r"messages\[1\].tool_calls must be a list of calls"),
        (
            {"role": "assistant", "tool_calls": [{"id": 1}]},
            r"tool_calls\[0\] must be \{function: \{name, arguments\}\}",
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{a"}]},
            r"tool_calls\[0\].arguments must be JSON, got '\{a'",
        ),
        ({"role": "user", "content": "\ud800"}, r"messages\[1\].content must be valid Unicode, got a lone surrogate"),
        (
            {"role": "assistant", "content": "a", "reasoning_content": 3},
            r"messages\[1\].reasoning_content must be a string, got int 3",
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"a": ["b", "\udc00"]}}]},
            r"messages\[1\].tool_calls\[0\].arguments.a\[1\] must be valid Unicode",
        ),
        (
            {"role": "assistant", "tool_calls": [{"name": "f", "arguments": {"\udc00": 1}}]},
            r"the key '\\udc00' of messages\[1\].tool_calls\[0\].arguments must be valid Unicode",
        ),
    ],
)
def test_wrong_messages_are_named(message: dict[str, Any], says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        checked_messages([{"role": "user", "content": "a"}, message], "record 1")


@pytest.mark.parametrize(("switch", "learned"), [({}, True), ({"weight": 0}, False), ({"train": True}, True)])
def test_switches_say_whether_an_answer_is_learned(switch: dict[str, object], learned: bool) -> None:
    message = {"role": "assistant", "content": "a", **switch}
    assert is_learned(message, "record 1") is learned
    assert without_switches(message) == {"role": "assistant", "content": "a"}


def test_a_switch_is_on_or_off() -> None:
    with pytest.raises(CheckpointError, match=r"record 1: weight must be 0 or 1, true or false; got 0.5"):
        is_learned({"role": "assistant", "content": "a", "weight": 0.5}, "record 1")


CHAT = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
    {"role": "assistant", "content": "d"},
    {"role": "user", "content": "e"},
]


@pytest.mark.parametrize(
    ("learn", "off", "expected"),
    [
        ("answers", [], [2, 4]),
        ("answers", [2], [4]),
        ("last-answer", [], [4]),
        ("last-answer", [2], [4]),
        ("last-answer", [4], []),
        ("all", [], [0, 1, 2, 3, 4, 5]),
        ("all", [2], [0, 1, 3, 4, 5]),
    ],
)
def test_messages_are_chosen_by_what_is_to_be_learned_and_by_switches(
    learn: str, off: list[int], expected: list[int]
) -> None:
    messages = [{**message, "train": False} if index in off else message for index, message in enumerate(CHAT)]
    assert learned_messages(messages, learn, "messages") == expected


def test_a_wrong_choice_or_switch_is_an_error() -> None:
    with pytest.raises(ConfigError, match="learn must be one of all, answers, last-answer; got 'answer'"):
        learned_messages(CHAT, "answer", "messages")
    wrong = [*CHAT[:2], {**CHAT[2], "weight": 2}, *CHAT[3:]]
    for learn in ("all", "last-answer"):
        with pytest.raises(CheckpointError, match=r"messages\[2\]: weight must be 0 or 1"):
            learned_messages(wrong, learn, "messages")
    assert learned_messages(CHAT[:2], "last-answer", "messages") == []
