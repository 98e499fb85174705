"""What a request asks for, checked. A key that is not known or not offered is refused, not passed over."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qlora_lite.checks import is_count
from qlora_lite.data.chat.messages import ASSISTANT, check_text, checked_messages
from qlora_lite.errors import CheckpointError, ConfigError, listing
from qlora_lite.generation.settings import GenerationSettings

MOST_STOPS = 4
LONGEST_STOP = 256
COMMON = ("model", "max_tokens", "temperature", "top_p", "seed", "stop", "stream", "stream_options", "user", "top_k")
OF_CHAT = ("messages", "max_completion_tokens")
OF_TEXT = ("prompt",)
# Keys that are accepted with the value that changes nothing: clients send them.
NEUTRAL: dict[str, tuple[object, ...]] = {
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), (None, 0)),
    **dict.fromkeys(("n", "best_of"), (None, 1)),
    **dict.fromkeys(("logprobs", "echo", "store"), (None, False)),
    **dict.fromkeys(("logit_bias", "metadata"), (None, {})),
    **dict.fromkeys(("tools", "functions"), (None, [])),
    **dict.fromkeys(("top_logprobs", "suffix", "tool_choice", "function_call"), (None,)),
    "response_format": (None, {"type": "text"}),
    "modalities": (None, ["text"]),
}


class RequestError(Exception):
    """A request that cannot be answered. key: of the request, that is wrong; code: as OpenAI's interface names it."""

    def __init__(self, message: str, key: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.key, self.status, self.code = key, status, code


@dataclass(frozen=True)
class Wanted:
    """What a request asks for. messages: of a chat; else text goes on. new_tokens: None for what the server gives."""

    model: str
    messages: list[dict[str, object]] | None
    text: str
    new_tokens: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: tuple[str, ...]
    stream: bool
    with_usage: bool

    def settings(self, new_tokens: int, draws_by_default: bool) -> GenerationSettings:
        """How the model answers. Where nothing is drawn a seed changes nothing, and clients send one for that."""
        chosen = self.temperature is not None or self.top_p is not None or self.top_k is not None
        is_drawn = self.temperature != 0 if chosen else draws_by_default
        try:
            return GenerationSettings(
                new_tokens, self.temperature, self.top_p, self.top_k, self.seed if is_drawn else None
            )
        except ConfigError as error:
            raise RequestError(str(error)) from error


def wanted_chat(body: Mapping[str, Any]) -> Wanted:
    """Returns what a request for a chat completion asks for. Raises RequestError."""
    _check_keys(body, OF_CHAT)
    try:
        messages = checked_messages(body.get("messages"), "request")
    except CheckpointError as error:
        raise RequestError(str(error).removeprefix("request: "), "messages") from error
    if messages[-1]["role"] == ASSISTANT:
        raise RequestError("the last message is the assistant's already; end with one of the user", "messages")
    if body.get("max_tokens") is not None and body.get("max_completion_tokens") is not None:
        raise RequestError("max_tokens and max_completion_tokens are the same; leave out one", "max_tokens")
    key = "max_tokens" if body.get("max_tokens") is not None else "max_completion_tokens"
    return _wanted(body, messages, "", key)


def wanted_text(body: Mapping[str, Any]) -> Wanted:
    """Returns what a request for a text completion asks for. Raises RequestError."""
    _check_keys(body, OF_TEXT)
    prompt = body.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    try:
        check_text(prompt, "prompt", "request")
    except CheckpointError as error:
        raise RequestError(str(error).removeprefix("request: "), "prompt") from error
    return _wanted(body, None, str(prompt), "max_tokens")


def _check_keys(body: Mapping[str, Any], own: tuple[str, ...]) -> None:
    known = (*COMMON, *own)
    if unknown := [key for key in body if key not in known and key not in NEUTRAL]:
        raise RequestError(f"unknown: {listing(unknown)}; known are {', '.join(sorted(known))}", unknown[0])
    for key, values in NEUTRAL.items():
        if key in body and key not in known and body[key] not in values:
            raise RequestError(f"{key} is not offered here; leave it out", key)


def _wanted(body: Mapping[str, Any], messages: list[dict[str, object]] | None, text: str, length_key: str) -> Wanted:
    new_tokens = body.get(length_key)
    if new_tokens is not None and not is_count(new_tokens, 1):
        raise RequestError(f"{length_key} must be a whole number of at least 1; got {new_tokens!r}", length_key)
    options = _typed(body, "stream_options", dict, {})
    if extra := [key for key in options if key != "include_usage"]:
        raise RequestError(f"stream_options has unknown keys: {listing(extra)}", "stream_options")
    stream = _typed(body, "stream", bool, False)
    if options and not stream:
        raise RequestError("stream_options need stream", "stream_options")
    top_p = _number(body, "top_p")
    return Wanted(
        _typed(body, "model", str, ""),
        messages,
        text,
        new_tokens,
        _number(body, "temperature"),
        None if top_p == 1 else top_p,
        _typed(body, "top_k", int, None),
        _typed(body, "seed", int, None),
        _stops(body.get("stop")),
        stream,
        _typed(options, "include_usage", bool, False),
    )


def _typed(body: Mapping[str, Any], key: str, kind: type, default: Any) -> Any:
    value = body.get(key)
    if value is None:
        return default
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {str: "a string", bool: "true or false", int: "a whole number", dict: "an object"}
        raise RequestError(f"{key} must be {names[kind]}; got {value!r:.80}", key)
    return value


def _number(body: Mapping[str, Any], key: str) -> float | None:
    value = body.get(key)
    if value is not None and (not isinstance(value, int | float) or isinstance(value, bool)):
        raise RequestError(f"{key} must be a number; got {value!r:.80}", key)
    return value


def _stops(value: object) -> tuple[str, ...]:
    stops = [] if value is None else [value] if isinstance(value, str) else value
    good = isinstance(stops, list) and all(isinstance(stop, str) and 0 < len(stop) <= LONGEST_STOP for stop in stops)
    if not good or not isinstance(stops, list) or len(stops) > MOST_STOPS:
        raise RequestError(
            f"stop must be a text, or at most {MOST_STOPS}, of 1 to {LONGEST_STOP} characters; got {value!r:.80}",
            "stop",
        )
    return tuple(stops)
