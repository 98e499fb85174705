"""Tests of replies; test_app.py has the real client read them."""

from __future__ import annotations

import json

from qlora_lite.generation.answering import Answer
from qlora_lite.serving.answers import Written
from qlora_lite.serving.replies import Reply, error_object, event
from qlora_lite.serving.wanted import RequestError

WRITTEN = Written(Answer("hé", 3, "stop"), 4)


def test_pieces_of_a_stream_share_an_id_with_the_whole() -> None:
    reply = Reply("m", True)
    whole, piece, last = reply.whole(WRITTEN), reply.piece("h"), reply.last(WRITTEN)
    assert {one["id"] for one in (whole, piece, last)} == {whole["id"]} and whole["id"].startswith("chatcmpl-")
    assert whole["usage"] == {"prompt_tokens": 4, "completion_tokens": 3, "total_tokens": 7}
    assert piece["choices"][0]["delta"] == {"content": "h"} and piece["choices"][0]["finish_reason"] is None
    assert last["choices"][0]["delta"] == {} and last["choices"][0]["finish_reason"] == "stop"
    assert Reply("m", True).whole(WRITTEN)["id"] != whole["id"]
    text = Reply("m", False)
    assert text.opening() is None and text.whole(WRITTEN)["choices"][0]["text"] == "hé"


def test_an_event_is_one_line() -> None:
    made = event({"a": "x\n\ny\ud800"})
    assert made.endswith(b"\n\n") and made.count(b"\n") == 2
    assert json.loads(made[len(b"data: ") :].decode())["a"].startswith("x\n\ny")


def test_errors_say_whose_they_are() -> None:
    assert error_object(RequestError("m", "n"))["error"] == {
        "message": "m",
        "type": "invalid_request_error",
        "param": "n",
        "code": None,
    }
    assert error_object(RequestError("m", None, 503, "c"))["error"]["type"] == "server_error"
