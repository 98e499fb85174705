"""Tests of the summary of a set of records, against counts made by hand and by brute force."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lite.data.summary import BINS, LENGTH_STEP, _bin_ends, _lengths, summarize
from qlora_lite.data.tokenization import tokenize_all

RECORDS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}], "id": 1},
    {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c"}], "id": 2},
    {"prompt": "a a a a a a", "completion": "d"},
    {"text": "a b c d", "source": "x", "id": 3},
    {"text": 5},
]


def test_counts_are_those_of_the_records(word_tokenizer: Any) -> None:
    found = summarize(tokenize_all(RECORDS, word_tokenizer(), max_length=6, skip_bad=1))
    assert (found.records, found.examples, found.duplicates, found.bad) == (5, 3, 1, 1)
    assert (found.shortened, found.dropped, found.split) == (2, 1, 0)
    assert found.tokens == 6 + 6 + 5 and found.learned_tokens == 3 + 3 + 4
    (source,) = found.sources
    assert source.shapes == {"messages": 2, "prompt and completion": 1, "text": 1}
    assert source.unused_keys == {"id": 3, "source": 1}
    assert source.bad_because == ["record 5: text must be a string, got int 5; write it as text in quotes"]
    assert found.packed_fill == pytest.approx(17 / 18)
    assert json.loads(json.dumps(found.to_json()))["lengths"]["longest"] == 11
    assert found.in_words() == [
        "5 records (2 messages, 1 prompt and completion, 1 text), 3 examples; keys not used: id, source",
        "17 tokens, 10 of them learned (59%); examples of 5 to 11 tokens, median 7",
        "1 duplicates, 2 shortened, 1 dropped, 1 bad records left out",
    ]


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=300))
@settings(max_examples=100, deadline=None)
def test_the_histogram_and_the_proposal_cover_the_lengths(lengths: list[int]) -> None:
    found = _lengths(torch.tensor(lengths, dtype=torch.int32))
    assert sum(found.counts) == len(lengths) and len(found.counts) == len(found.up_to) <= BINS
    for end, before, count in zip(found.up_to, [0, *found.up_to], found.counts, strict=False):
        assert count == sum(before < length <= end for length in lengths)
    proposed = found.proposed_max_length
    assert proposed % LENGTH_STEP == 0
    whole = [sum(length <= limit for length in lengths) for limit in (proposed, proposed - LENGTH_STEP)]
    assert whole[0] >= 0.99 * len(lengths) > whole[1]
    assert (found.shortest, found.longest) == (min(lengths), max(lengths))
    assert found.median == sorted(lengths)[(len(lengths) - 1) // 2]


@pytest.mark.parametrize(("longest", "width", "count"), [(1, 1, 1), (16, 1, 16), (17, 2, 9), (591, 50, 12)])
def test_bins_end_at_round_numbers(longest: int, width: int, count: int) -> None:
    assert _bin_ends(longest) == [width * number for number in range(1, count + 1)]
