"""The messages of a conversation, checked, in the form of OpenAI's chats and without what Arrow adds.

    {"role": "assistant", "content": "...", "reasoning_content": "...", "weight": 1,
     "tool_calls": [{"type": "function", "function": {"name": "...", "arguments": {...}}}]}

content: text, a list of parts (texts and images), or null for an answer that only calls tools. arguments: an object or
JSON text. A null in any other place counts as absent, since Arrow writes one for every missing column. `weight` (0 or
1), `train`, `trainable` and `loss` say whether an answer is learned; `learned_messages` chooses among the others.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from qlora_lite.checkpoints.files import excerpt
from qlora_lite.errors import CheckpointError, ConfigError

ASSISTANT = "assistant"
SWITCHES = ("weight", "train", "trainable", "loss")
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
TEXT_KEYS = {"role", *REASONING_KEYS}
SWITCHES_AS_SET = frozenset(SWITCHES)
LEARN = ("all", "answers", "last-answer")
Message = Mapping[str, object]


def check_text(value: object, name: str, place: str) -> None:
    """Raises CheckpointError, beginning with `place`, unless the value is a string that UTF-8 can hold."""
    if not isinstance(value, str):
        got = f"{type(value).__name__} {excerpt(value)}"
        raise CheckpointError(f"{place}: {name} must be a string, got {got}; write it as text in quotes")
    if value.isascii():
        return
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        got = f"a lone surrogate at character {error.start + 1}"
        raise CheckpointError(f"{place}: {name} must be valid Unicode, got {got}; remove it") from error


def _check_unicode(value: object, name: str, place: str) -> None:
    """Raises CheckpointError for a string anywhere in a JSON value that UTF-8 cannot hold."""
    if isinstance(value, str):
        check_text(value, name, place)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            check_text(key, f"the key {key!a} of {name}", place)
            _check_unicode(part, f"{name}.{key}", place)
    elif isinstance(value, list):
        for number, part in enumerate(value):
            _check_unicode(part, f"{name}[{number}]", place)


def without_nulls(value: object) -> object:
    """A JSON value without the keys that hold null."""
    if isinstance(value, str):  # most values are, and other tests take longer
        return value
    if isinstance(value, Mapping):
        return {key: without_nulls(part) for key, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_nulls(part) for part in value]
    return value


def checked_messages(messages: object, place: str) -> list[dict[str, object]]:
    """Copies of the messages, checked; `content` is None where an answer only calls tools.

    Raises CheckpointError, beginning with `place`, for what is not a conversation.
    """
    if not isinstance(messages, list) or not messages:
        wanted = "messages must be a list of {role, content}, at least one"
        raise CheckpointError(f"{place}: {wanted}, got {type(messages).__name__} {excerpt(messages)}")
    return [
        dict(message) if _is_plain(message) else _checked(message, f"messages[{index}]", place)
        for index, message in enumerate(messages)
    ]


def _is_plain(message: object) -> bool:
    """Whether a message is a role and a text, as most are; then there is nothing to check."""
    if type(message) is not dict or len(message) != 2:
        return False
    role, content = message.get("role"), message.get("content")
    return type(role) is str and type(content) is str and _is_unicode(role) and _is_unicode(content)


def _is_unicode(text: str) -> bool:
    """Whether UTF-8 can hold a text."""
    if text.isascii():
        return True
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _checked(message: object, name: str, place: str) -> dict[str, object]:
    if not isinstance(message, Mapping) or message.get("role") is None:
        raise CheckpointError(f"{place}: {name} must be {{role, content}}, got {excerpt(message)}")
    checked = {key: without_nulls(value) for key, value in message.items() if value is not None}
    for key, value in checked.items():
        if key in TEXT_KEYS:
            check_text(value, f"{name}.{key}", place)
        elif key != "content" and not isinstance(value, int | float):
            _check_unicode(value, f"{name}.{key}", place)
    if calls := checked.pop("tool_calls", None):
        checked["tool_calls"] = _checked_calls(calls, f"{name}.tool_calls", place)
    content = checked.get("content")
    if isinstance(content, list):
        for number, part in enumerate(content):
            kind = part.get("type", "text") if isinstance(part, Mapping) else None
            if kind == "text":
                check_text(part.get("text"), f"{name}.content[{number}].text", place)
            elif kind != "image":
                wanted = f"{name}.content[{number}] must be a part of type text or image"
                raise CheckpointError(f"{place}: {wanted}, got {excerpt(part)}; remove it")
    elif content is None and "tool_calls" in checked:
        checked["content"] = None
    elif content is None and "content" not in message:
        raise CheckpointError(f"{place}: {name} must be {{role, content}}, got {excerpt(message)}")
    else:
        check_text(content, f"{name}.content", place)
    return checked


def _checked_calls(calls: object, name: str, place: str) -> list[dict[str, object]]:
    if not isinstance(calls, list):
        raise CheckpointError(f"{place}: {name} must be a list of calls, got {excerpt(calls)}")
    checked = []
    for number, call in enumerate(calls):
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            wanted = "{function: {name, arguments}}"
            raise CheckpointError(f"{place}: {name}[{number}] must be {wanted}, got {excerpt(call)}")
        arguments = function.get("arguments", {})
        if isinstance(arguments, str):
            try:
                json.loads(arguments or "{}")
            except ValueError as error:
                got = excerpt(arguments)
                raise CheckpointError(f"{place}: {name}[{number}].arguments must be JSON, got {got}") from error
        made = {"name": function["name"], "arguments": arguments if arguments != "" else {}}
        rest = call if "function" in call else {}
        checked.append({"type": "function", **rest, "function": made})
    return checked


def is_learned(message: Message, place: str) -> bool:
    """Whether the switches of an answer say that it is learned; they do if there are none.

    Raises CheckpointError, beginning with `place`, for a switch that is neither on nor off.
    """
    if SWITCHES_AS_SET.isdisjoint(message):
        return True
    for key in SWITCHES:
        if key in message and message[key] not in (0, 1):
            raise CheckpointError(f"{place}: {key} must be 0 or 1, true or false; got {excerpt(message[key])}")
    return all(message.get(key, True) for key in SWITCHES)


def without_switches(message: Message) -> dict[str, object]:
    """The message as a chat template gets it."""
    if SWITCHES_AS_SET.isdisjoint(message):
        return dict(message)
    return {key: value for key, value in message.items() if key not in SWITCHES}


def learned_messages(messages: Sequence[Message], learn: str, name: str) -> list[int]:
    """The indices of the messages that are learned: all, all answers, or the last answer, less those switched off.

    learn: one of LEARN. Raises ConfigError for another, and CheckpointError for a switch that is neither on nor off;
    `name` is that of the messages.
    """
    if learn not in LEARN:
        raise ConfigError(f"learn must be one of {', '.join(LEARN)}; got {learn!r}")
    answers = [index for index, message in enumerate(messages) if message["role"] == ASSISTANT]
    switched_on = [index for index in answers if is_learned(messages[index], f"{name}[{index}]")]
    if learn == "all":
        left_out = {*answers} - {*switched_on}
        return [index for index in range(len(messages)) if index not in left_out]
    return [index for index in switched_on if learn == "answers" or index == answers[-1]]
