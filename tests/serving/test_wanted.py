"""Tests of what requests ask for: checked, and nothing passed over."""

from __future__ import annotations

from typing import Any

import pytest

from qlora_lite.serving.wanted import RequestError, wanted_chat, wanted_text

HI = [{"role": "user", "content": "hi"}]


def test_a_request_is_read_whole() -> None:
    options = {"temperature": 0.5, "top_p": 1, "top_k": 3, "seed": 4, "stop": "x", "stream": True}
    wanted = wanted_chat({"model": "m", "messages": HI, "max_completion_tokens": 7, "n": 1, "tools": [], **options})
    assert (wanted.model, wanted.messages, wanted.new_tokens, wanted.stop) == ("m", HI, 7, ("x",))
    assert wanted.stream and not wanted.with_usage
    settings = wanted.settings(7, False)
    assert (settings.temperature, settings.top_p, settings.top_k, settings.seed) == (0.5, None, 3, 4)
    text = wanted_text({"model": "m", "prompt": ["a"], "stream": True, "stream_options": {"include_usage": True}})
    assert (text.messages, text.text, text.new_tokens, text.with_usage) == (None, "a", None, True)


@pytest.mark.parametrize(
    ("temperature", "by_model", "seed"), [(0, True, None), (None, False, None), (None, True, 4), (1, False, 4)]
)
def test_a_seed_changes_nothing_where_nothing_is_drawn(
    temperature: float | None, by_model: bool, seed: int | None
) -> None:
    wanted = wanted_chat({"messages": HI, "seed": 4, "temperature": temperature})
    assert wanted.settings(5, by_model).seed == seed


@pytest.mark.parametrize(
    ("change", "key", "error"),
    [
        ({"quux": 1}, "quux", "unknown: quux; known are max_completion_tokens, "),
        ({"n": 2}, "n", "n is not offered here; leave it out"),
        ({"tools": [{}]}, "tools", "tools is not offered here; leave it out"),
        ({"messages": []}, "messages", "messages must be a list of {role, content}, at least one, got list"),
        ({"messages": [*HI, {"role": "assistant", "content": "a"}]}, "messages", "the last message is the assistant's"),
        (
            {"messages": [{"role": "user", "content": "\ud800"}]},
            "messages",
            "messages[0].content must be valid Unicode",
        ),
        ({"max_tokens": 0}, "max_tokens", "max_tokens must be a whole number of at least 1; got 0"),
        ({"max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "max_tokens and max_completion_tokens are the s"),
        ({"temperature": "hot"}, "temperature", "temperature must be a number; got 'hot'"),
        ({"seed": True}, "seed", "seed must be a whole number; got True"),
        ({"stop": ["a"] * 5}, "stop", "stop must be a text, or at most 4, of 1 to 256 characters"),
        ({"stop": ""}, "stop", "stop must be a text, or at most 4, of 1 to 256 characters"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream_options need stream"),
        ({"stream": 1}, "stream", "stream must be true or false; got 1"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], key: str, error: str) -> None:
    with pytest.raises(RequestError) as refused:
        wanted_chat({"model": "m", "messages": HI, **change})
    assert str(refused.value).startswith(error) and refused.value.key == key and refused.value.status == 400


def test_settings_and_prompts_are_checked() -> None:
    with pytest.raises(RequestError, match="temperature must be at least 0; got -1"):
        wanted_chat({"messages": HI, "temperature": -1}).settings(5, False)
    for prompt in (None, 7, ["a", "b"], [1, 2]):
        with pytest.raises(RequestError, match="prompt must be a string, got"):
            wanted_text({"prompt": prompt})
