"""Tests of renderings of a conversation and of its beginnings, by templates that are functions."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from qlora_lite.data.chat.messages import Message
from qlora_lite.data.chat.renderings import Renderings
from qlora_lite.data.chat.turns import ChatTemplateError, Writer

MESSAGES = [
    {"role": "user", "content": " a "},
    {"role": "assistant", "content": "<think>b</think> c", "reasoning_content": "d"},
    {"role": "user", "content": "e"},
]


def write(messages: Sequence[Message], for_generation: bool) -> str:
    return "".join(f"[{message['content']}]" for message in messages) + ">" * for_generation


def renderings(write: object = write) -> Renderings:
    return Renderings(MESSAGES, Writer(write, lambda text, position: 0))  # type: ignore[arg-type]


def test_pieces_are_found_in_the_plain_text() -> None:
    found = renderings()
    assert [piece.text for piece in found.pieces] == ["a", "b", "c", "d", "e"] and found.of == [[0], [1, 2, 3], [4]]
    whole = found.up_to(3)
    assert whole.text == "[ a ][<think>b</think> c][e]"
    assert [whole.text[start:stop] for start, stop in whole.order] == ["a", "b", "c", "e"]
    assert whole.whole == 3  # the field of the reasoning is not written
    assert found.extent(whole, 0) == (2, 3) and found.extent(whole, 2) == (26, 27)
    assert (whole.end_before(2), whole.start_behind(2), whole.end_before(3), whole.start_behind(27)) == (0, 2, 3, 28)
    assert found.up_to(1, True).text == "[ a ]>"


def test_each_beginning_is_written_once_with_marks_and_once_without() -> None:
    calls = []

    def counted(messages: Sequence[Message], for_generation: bool) -> str:
        calls.append((len(messages), for_generation))
        return write(messages, for_generation)

    found = renderings(counted)
    assert found.up_to(2) is found.up_to(2)
    found.up_to(2, True)
    assert calls == [(2, False)] * 2 + [(2, True)] * 2


def test_text_that_is_missing_is_named() -> None:
    def of_answers(messages: Sequence[Message], for_generation: bool) -> str:
        return write([message for message in messages if message["role"] == "assistant"], for_generation)

    with pytest.raises(ChatTemplateError, match=r"leaves out messages\[0\].content, messages\[2\].content$"):
        renderings(of_answers).up_to(3)
    whole = renderings().up_to(3)
    renderings().check_written(whole, [0, 1, 2, 4])
    with pytest.raises(ChatTemplateError, match=r"leaves out messages\[1\].reasoning_content$"):
        renderings().check_written(whole, [2, 3])


def test_a_template_that_computes_with_texts_is_refused() -> None:
    def counting(messages: Sequence[Message], for_generation: bool) -> str:
        return write(messages, for_generation) + str(len(str(messages[0]["content"])))

    with pytest.raises(ChatTemplateError, match="computes with the text of messages"):
        renderings(counting).up_to(1)
