"""Tests of marks around the pieces of a conversation, against the positions of the plain pieces."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

import qlora_lite.data.chat.marks as marks
from qlora_lite.data.chat.marks import END_OF_GENERATION, GENERATION, MarkedMessages, marks_in, without_marks


@given(st.lists(st.text(max_size=12).filter(lambda text: not marks_in([{"role": text}])), min_size=1, max_size=5))
def test_pieces_are_found_where_they_stand(contents: list[str]) -> None:
    marked = MarkedMessages([{"role": "user", "content": text} for text in contents])
    rendering = without_marks("".join(f"[{message['content']}]" for message in marked.messages))
    assert rendering.text == "".join(f"[{text}]" for text in contents)
    assert len(rendering.spans) == len(marked.pieces) == sum(bool(text.strip()) for text in contents)
    for number, (start, stop) in rendering.spans.items():
        assert (
            rendering.text[start:stop] == marked.pieces[number].text == contents[marked.pieces[number].message].strip()
        )


def test_every_text_of_a_message_is_marked_and_tags_are_not() -> None:
    call = {"function": {"name": "f", "arguments": {"a": "x", "b": [2, "y"]}}}
    as_text = {"function": {"name": "g", "arguments": json.dumps({"a": "z"})}}
    message = {"role": "assistant", "content": "<think>\nwhy\n</think>\n\nso", "tool_calls": [call, as_text]}
    marked = MarkedMessages([message])
    found = [(piece.field, piece.text) for piece in marked.pieces]
    assert found == [
        ("content", "why"),
        ("content", "so"),
        ("tool_calls[0].name", "f"),
        ("tool_calls[0].arguments.a", "x"),
        ("tool_calls[0].arguments.b[1]", "y"),
        ("tool_calls[1].name", "g"),
        ("tool_calls[1].arguments.a", "z"),
    ]
    assert [piece.text for piece in marked.numbers[0]] == ["2"]
    content = str(marked.messages[0]["content"])
    assert content.startswith("<think>\n") and "\n</think>\n\n" in content


def test_a_piece_that_is_written_twice_counts_at_its_first_place() -> None:
    marked = MarkedMessages([{"role": "user", "content": "a b"}])
    content = marked.messages[0]["content"]
    rendering = without_marks(f"{content} and {content}")
    assert rendering.spans == {0: (0, 3)} and rendering.repeated == {0} and rendering.whole == 1


@given(
    st.lists(st.text(alphabet="a <é\U0001f44b", max_size=4), min_size=1, max_size=4),
    st.lists(st.integers(min_value=0, max_value=3) | st.sampled_from(["|", GENERATION, END_OF_GENERATION]), max_size=8),
    st.integers(min_value=0, max_value=6),
)
def test_both_ways_to_read_marks_agree(contents: list[str], order: list[int | str], cut: int) -> None:
    """The quick way is taken for renderings in which each piece is whole and stands once."""
    messages = MarkedMessages([{"role": "user", "content": text} for text in contents]).messages
    parts = [part if isinstance(part, str) else str(messages[part % len(messages)]["content"]) for part in order]
    for marked in ("".join(parts), "".join(parts)[cut:]):
        quick = marks._in_order(marked)
        assert quick in (None, marks._in_any_order(marked))
        if not any(mark in marked for mark in (GENERATION, END_OF_GENERATION)) and marked == "".join(parts):
            pieces = [part for part in order if not isinstance(part, str) and contents[part % len(messages)].strip()]
            repeated = len({part % len(messages) for part in pieces if not isinstance(part, str)}) < len(pieces)
            assert (quick is None) is repeated


def test_generated_text_is_between_its_marks() -> None:
    marked = MarkedMessages([{"role": "assistant", "content": "a b"}]).messages[0]["content"]
    rendering = without_marks(f"x{GENERATION}{marked}{END_OF_GENERATION}y{GENERATION}{END_OF_GENERATION}z")
    assert rendering.text == "xa byz" and rendering.spans == {0: (1, 4)} and rendering.generated == ((1, 4),)
    nested = without_marks(f"{GENERATION}a{GENERATION}b{END_OF_GENERATION}c{END_OF_GENERATION}d")
    assert nested.text == "abcd" and nested.generated == ((0, 3),)


def test_private_characters_are_found_anywhere() -> None:
    call = {"function": {"name": "f", "arguments": {"a": ["\ue01f"]}}}
    assert marks_in([{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}])
    assert marks_in([{"role": "assistant", "tool_calls": [{"function": {"arguments": {"\ue000": 1}}}]}])
    assert not marks_in([{"role": "user", "content": "\ue020 é", "weight": 1}])
