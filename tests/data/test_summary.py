"""Tests of the summary of a set of records, against counts made by hand and by brute force."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lite.data.summary import BINS, LENGTH_STEP, Summary, _bin_ends, _lengths, summarize
from qlora_lite.data.tokenization import DataConfig, tokenize_all, tokenize_sources

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
    assert (found.learned_tokens_lost, found.nothing_to_learn, found.max_length) == (1 + 1 + 3, 0, 6)
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
    assert found.in_words(packing=True)[-1].endswith("; packed rows 94.4% full")


def test_figures_are_for_people(word_tokenizer: Any) -> None:
    silent = {"messages": [{"role": "assistant", "content": "a", "weight": 0}]}
    records = [*RECORDS[:4], silent, {"prompt": "a a a a a a a a", "completion": "d"}]
    found = summarize(tokenize_all(records, word_tokenizer(), 6), longest_sequence=10)
    assert found.sources[0].figures() == [
        ("records", "6"),
        ("shapes", "3 messages, 2 prompt and completion, 1 text"),
        ("keys not read", "id (in 3), source (in 1)"),
        ("bad records", "0"),
        ("examples", "6"),
    ]
    assert found.figures() == [
        ("examples to train on", "3"),
        ("conversations split", "0"),
        ("duplicate records", "1"),
        ("examples shortened", "2 at 6 tokens"),
        ("examples dropped", "3: 1 with nothing to learn, 2 with nothing to learn before the cut"),
        ("tokens", "17: 10 learned (59%), 7 not"),
        ("learned tokens lost", "8 (44.4%) at 6 tokens"),
        ("packed rows", "94.4% full at 6 tokens"),
    ]
    assert found.length_notes() == [
        "3 to 13 tokens, median 7, 99% have at most 13",
        "proposed: --max-length 10, the model's longest sequence; 13 would leave 99% of the examples whole",
        "the model's longest sequence: 10 tokens",
    ]
    assert found.lengths.proposed_max_length == 10


def test_a_longer_example_than_the_model_takes_is_said(word_tokenizer: Any) -> None:
    def notes(max_length: int | None, longest: int | None) -> list[str]:
        return summarize(tokenize_all([{"text": "a " * 70}], word_tokenizer(), max_length), longest).length_notes()[1:]

    smallest = "the smallest multiple of 64 that leaves 99% of the examples whole"
    assert notes(None, None) == notes(20, None) == [f"proposed: --max-length 128, {smallest}"]
    model = "the model's longest sequence"
    assert notes(None, 2048) == [f"proposed: --max-length 128, {smallest}", f"{model}: 2,048 tokens"]
    assert notes(40, 128) == [f"proposed: --max-length 128, {model}", f"{model}: 128 tokens"]
    beyond = notes(60, 50)
    assert beyond[0] == f"proposed: --max-length 50, {model}; 71 would leave 99% of the examples whole"
    assert beyond[2] == "--max-length leaves examples of up to 60 tokens, which is more"
    assert notes(None, 50)[2] == "--max-length leaves examples of up to 71 tokens, which is more"


def test_weights_say_what_an_epoch_takes(word_tokenizer: Any, tmp_path: Path) -> None:
    for name, count in (("a", 10), ("b", 4)):
        lines = [json.dumps({"text": f"{name} {'c ' * number}"}) for number in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")

    def found(*weights: str) -> Summary:
        names = [f"{tmp_path / name}.jsonl{weight}" for name, weight in zip("ab", weights, strict=True)]
        return summarize(tokenize_sources(names, word_tokenizer(), DataConfig(64)))

    unweighted, weighted = found("", ""), found("=1", "=3")
    assert [(source.weight, source.examples_in_epoch) for source in unweighted.sources] == [(None, 10), (None, 4)]
    assert [(source.weight, source.examples_in_epoch) for source in weighted.sources] == [(0.25, 1), (0.75, 4)]
    assert weighted.sources[1].figures()[-2:] == [
        ("examples", "4, their tokens read from the cache"),
        ("of an epoch", "4 examples (75%)"),
    ]
    assert unweighted.sources[1].figures()[-1] == ("examples", "4")


@given(st.lists(st.integers(1, 100_000), min_size=1, max_size=300))
@settings(max_examples=100, deadline=None)
def test_the_histogram_and_the_proposal_cover_the_lengths(lengths: list[int]) -> None:
    found = _lengths(torch.tensor(lengths, dtype=torch.int32))
    assert sum(found.counts) == len(lengths) and len(found.counts) == len(found.up_to) <= BINS + 1
    for end, before, count in zip(found.up_to, [0, *found.up_to], found.counts, strict=False):
        assert count == sum(before < length <= end for length in lengths)
    proposed = found.proposed_max_length
    assert proposed % LENGTH_STEP == 0
    whole = [sum(length <= limit for length in lengths) for limit in (proposed, proposed - LENGTH_STEP)]
    assert whole[0] >= 0.99 * len(lengths) > whole[1]
    assert (found.shortest, found.longest) == (min(lengths), max(lengths))
    at_most = [sum(length <= limit for length in lengths) for limit in (found.most, found.most - 1)]
    assert at_most[0] >= 0.99 * len(lengths) > at_most[1]
    assert found.median == sorted(lengths)[(len(lengths) - 1) // 2]


@pytest.mark.parametrize(("longest", "width", "count"), [(1, 1, 1), (16, 1, 16), (17, 2, 9), (591, 50, 12)])
def test_bins_end_at_round_numbers(longest: int, width: int, count: int) -> None:
    assert _bin_ends(longest) == [width * number for number in range(1, count + 1)]


def test_the_longest_of_many_do_not_flatten_the_histogram() -> None:
    found = _lengths(torch.tensor([*range(1, 400), 90_000], dtype=torch.int32), 8192)
    assert found.up_to == [*range(50, 401, 50), 90_000] and found.counts[-1] == 1
    assert (found.most, found.proposed_max_length) == (396, 448)
