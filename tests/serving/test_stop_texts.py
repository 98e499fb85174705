"""Tests of StopTexts: the text up to the first stop text, however it is cut into pieces."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from qlora_lite.serving.stop_texts import StopTexts


def passed_on(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    texts = StopTexts(stops)
    return "".join([*map(texts.add, pieces), texts.rest()]), texts.found


def test_text_that_may_begin_a_stop_text_waits() -> None:
    texts = StopTexts(["END"])
    assert [texts.add(piece) for piece in ("aE", "N", "x EN", "D b", "c")] == ["a", "", "ENx ", "", ""]
    assert texts.found and texts.rest() == ""
    assert passed_on(["END"], ["aE"]) == ("aE", False) and passed_on([], ["a", "b"]) == ("ab", False)


@given(
    st.lists(st.text("ab", min_size=1, max_size=3), min_size=1, max_size=3),
    st.lists(st.text("abc", max_size=3), max_size=8),
)
def test_pieces_do_not_matter(stops: list[str], pieces: list[str]) -> None:
    """One letter at a time, which decides which of two overlapping stop texts is seen first."""
    text, found = passed_on(stops, list("".join(pieces)))
    ends = [end for end in range(len("".join(pieces)) + 1) if any("".join(pieces)[:end].endswith(s) for s in stops)]
    assert found == bool(ends)
    if ends:
        seen = "".join(pieces)[: ends[0]]
        assert text == seen[: min(len(seen) - len(stop) for stop in stops if seen.endswith(stop))]
    else:
        assert text == "".join(pieces)
    coarse, found_coarsely = passed_on(stops, pieces)
    assert found_coarsely == found and text.startswith(coarse)
