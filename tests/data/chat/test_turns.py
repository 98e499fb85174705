"""Tests of how small templates open and end answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from qlora_lite.data.chat.messages import Message
from qlora_lite.data.chat.turns import (
    MOST_SHAPES,
    Borders,
    KnownShapes,
    Turn,
    Writer,
    common_length,
    generation_start,
)


def special_at(text: str, position: int) -> int:
    return next((len(tag) for tag in ("<user>", "<assistant>", "</s>") if text.startswith(tag, position)), 0)


def written(end: str, last: str = "", opening: str = "<assistant>") -> Callable[[Sequence[Message], bool], str]:
    def write(messages: Sequence[Message], for_generation: bool) -> str:
        text = "".join(f"<{message['role']}>{message['content']}{end}" for message in messages)
        return text + (opening if for_generation else last)

    return write


@pytest.mark.parametrize(
    ("write", "expected"),
    [
        (written("<end>"), Turn("<assistant>", True)),
        (written("", last="</s>"), Turn("<assistant>", True)),  # both begin with `<`, and the opening is whole
        (written(""), Turn("<assistant>", False)),
        (written("<end>", opening=""), Turn("", True)),
        (written("", opening="<assistant>\n<think>\n"), Turn("<assistant>\n<think>\n", False)),
    ],
)
def test_openings_and_ends_are_read_from_renderings(
    write: Callable[[Sequence[Message], bool], str], expected: Turn
) -> None:
    assert KnownShapes().turn(Writer(write, special_at), None, False) == expected


def test_a_turn_is_rendered_once_for_each_setting() -> None:
    calls = []

    def counted(messages: Sequence[Message], for_generation: bool) -> str:
        calls.append(messages)
        return written("<end>")(messages, for_generation)

    known, writer = KnownShapes(), Writer(counted, special_at)
    for setting, in_parts in (("a", False), ("a", False), ("b", False), ("b", True)):
        known.turn(writer, setting, in_parts)
    assert len(calls) == 9 and calls[-1][0]["content"] == [{"type": "text", "text": "question"}]


@pytest.mark.parametrize(
    ("text", "prompt", "opening", "quiet", "learned"),
    [
        ("<a>|X", "<a>", "<a>", "X", "X"),
        ("<a>|<think>\n\n</think>\n\nX", "<a>", "<a>", "X", "<think>\n\n</think>\n\nX"),
        ("<a><think>\n|\n</think>\n\nX", "<a><think>\n", "<a><think>\n", "X", "\n</think>\n\nX"),
        ("<a><think></think>|X", "<a><think></think>", "<a>", "X", "X"),
        ("<b>|<a>X", "<b>", "<a>", "X", "X"),
    ],
)
def test_an_answer_begins_behind_its_prompt_and_its_opening(
    text: str, prompt: str, opening: str, quiet: str, learned: str
) -> None:
    whole = text.replace("|", "")
    for learn, expected in ((False, quiet), (True, learned)):
        start = generation_start(whole, len(prompt), whole.index("X"), Turn(opening, True), learn)
        assert whole[start:] == expected


def test_texts_are_compared_to_their_first_difference() -> None:
    for one, other, shared in (("", "a", 0), ("ab", "abc", 2), ("abd", "abc", 2), ("abc", "abc", 3), ("xbc", "abc", 0)):
        assert common_length(one, other) == common_length(other, one) == shared


def test_shapes_do_not_fill_the_memory() -> None:
    known = KnownShapes()
    for number in range(MOST_SHAPES + 1):
        known.remember((number,), Borders(number, 0))
    assert list(known.borders) == [(MOST_SHAPES,)]
