"""Tests of marks around the pieces of a conversation, against the positions of the plain pieces."""

from __future__ import annotations

import json

from hypothesis import given
from hypothesis import strategies as st

from qlora_lite.data.chat.marks import MarkedMessages, marks_in, without_marks


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
