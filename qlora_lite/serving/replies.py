"""The objects that clients of OpenAI's interface expect: whole answers, pieces of a stream, models and errors."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from typing import Any

from qlora_lite.serving.answers import Written
from qlora_lite.serving.wanted import RequestError

DONE = b"data: [DONE]\n\n"
OWNER = "qlora-lite"
SERVER_ERROR = 500


class Reply:
    """The replies to one request: they share an id and a time. is_chat: whether it asked for a chat completion."""

    def __init__(self, model: str, is_chat: bool) -> None:
        self._model, self._is_chat = model, is_chat
        self._id = f"{'chatcmpl' if is_chat else 'cmpl'}-{secrets.token_hex(12)}"
        self._created = int(time.time())

    def whole(self, written: Written) -> dict[str, Any]:
        """The reply to a request that does not stream."""
        answer = written.answer
        said = {"message": {"role": "assistant", "content": answer.text}} if self._is_chat else {"text": answer.text}
        choice = {"index": 0, **said, "finish_reason": answer.finish_reason, "logprobs": None}
        return self._object("", [choice]) | {"usage": usage(written)}

    def opening(self) -> dict[str, Any] | None:
        """The first piece of a chat's stream: who speaks."""
        return self._piece({"role": "assistant", "content": ""}, None) if self._is_chat else None

    def piece(self, text: str) -> dict[str, Any]:
        """A piece of the answer."""
        return self._piece({"content": text} if self._is_chat else text, None)

    def last(self, written: Written) -> dict[str, Any]:
        """The last piece: why the answer ended."""
        return self._piece({} if self._is_chat else "", written.answer.finish_reason)

    def counted(self, written: Written) -> dict[str, Any]:
        """What follows the last piece if the request asked for the numbers of tokens."""
        return self._object(".chunk", []) | {"usage": usage(written)}

    def _piece(self, said: object, reason: str | None) -> dict[str, Any]:
        key = "delta" if self._is_chat else "text"
        return self._object(".chunk", [{"index": 0, key: said, "finish_reason": reason, "logprobs": None}])

    def _object(self, suffix: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        kind = f"chat.completion{suffix}" if self._is_chat else "text_completion"
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model, "choices": choices}


def usage(written: Written) -> dict[str, int]:
    """The numbers of tokens."""
    before, new = written.prompt_tokens, written.answer.tokens
    return {"prompt_tokens": before, "completion_tokens": new, "total_tokens": before + new}


def event(value: Mapping[str, Any]) -> bytes:
    """A server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n\n"


def model_object(name: str, created: int) -> dict[str, Any]:
    """A model of the list of models."""
    return {"id": name, "object": "model", "created": created, "owned_by": OWNER}


def error_object(error: RequestError) -> dict[str, Any]:
    """An error, as clients read it."""
    kind = "server_error" if error.status >= SERVER_ERROR else "invalid_request_error"
    return {"error": {"message": str(error), "type": kind, "param": error.key, "code": error.code}}
