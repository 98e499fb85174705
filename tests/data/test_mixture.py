"""Tests of mixtures: how often each source occurs, epochs that are made again, and examples that are held out."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lite.data.batching import batches, epoch_order
from qlora_lite.data.encoding import Marked
from qlora_lite.data.mixture import Mixture, common_records, mixture_weights
from qlora_lite.data.token_arrays import Examples, TokenWriter
from qlora_lite.errors import CheckpointError, ConfigError


def examples_from(first: int, count: int, per_record: int = 1) -> Examples:
    writer = TokenWriter()
    for number in range(count):
        example = Marked([first + number, 1], [(0, 2)])
        writer.append(number, [example] * per_record)
    return Examples(writer.finish()[0])


def test_parts_stand_one_after_the_other() -> None:
    mixture = Mixture([examples_from(0, 3), examples_from(100, 2)])
    firsts = [example.input_ids[0] for example in mixture]
    assert firsts == [0, 1, 2, 100, 101]
    assert [mixture[n].input_ids[0] for n in range(-5, 5)] == firsts * 2
    assert mixture[1:4] == [mixture[1], mixture[2], mixture[3]]
    assert mixture.lengths.tolist() == [2] * 5
    assert list(mixture.epoch_order(7, 2)) == list(epoch_order(5, 7, 2))
    with pytest.raises(IndexError, match="example 5 of 5"):
        mixture[5]


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    data=st.data(),
    seed=st.integers(0, 3),
)
@settings(max_examples=80, deadline=None)
def test_weights_are_shares_of_each_epoch(sizes: list[int], data: st.DataObject, seed: int) -> None:
    weights = data.draw(st.lists(st.floats(0.05, 10), min_size=len(sizes), max_size=len(sizes)))
    mixture = Mixture([examples_from(1000 * n, size) for n, size in enumerate(sizes)], weights)
    counts = mixture.counts()
    total = min(size / (weight / sum(weights)) for size, weight in zip(sizes, weights, strict=True))
    for size, weight, count in zip(sizes, weights, counts, strict=True):
        assert count == max(1, min(size, round(total * weight / sum(weights))))
    assert any(count == size for count, size in zip(counts, sizes, strict=True)), "no source is used whole"
    taken: Counter[int] = Counter()
    for epoch in range(5):
        order = mixture.epoch_order(seed, epoch)
        assert list(order) == list(mixture.epoch_order(seed, epoch))
        assert len(order) == sum(counts)
        taken.update(order)
        first = 0
        for size, count in zip(sizes, counts, strict=True):
            times = [taken[index] for index in range(first, first + size)]
            assert sum(times) == count * (epoch + 1)
            assert max(times) - min(times) <= 1, "an example came again before all others had come"
            first += size


def test_batches_follow_the_weights() -> None:
    mixture = Mixture([examples_from(0, 30), examples_from(100, 30)], [2, 1])
    found = Counter(
        int(token) >= 100
        for batch in batches(mixture, 5, 0, pad_token_id=0, epochs=1)
        for token in batch["input_ids"][:, 0]
    )
    assert found == {False: 30, True: 15}


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.0], [1.0, float("nan")], [1.0, -2.0]])
def test_wrong_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match="weights must be 2 numbers above 0"):
        Mixture([examples_from(0, 3), examples_from(9, 3)], weights)


def test_all_sources_have_weights_or_none() -> None:
    assert mixture_weights([None, None]) is None
    assert mixture_weights([0.5, 2.0]) == [0.5, 2.0]
    with pytest.raises(ConfigError, match="give all sources a weight, or none; got 1 weights for 2 sources"):
        mixture_weights([0.5, None])


@given(count=st.integers(2, 60), share=st.floats(0.01, 0.9), copies=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_held_out_records_are_apart(count: int, share: float, copies: int) -> None:
    parts = [examples_from(0, count, copies), examples_from(0, count, copies)]  # every record occurs twice
    mixture = Mixture(parts)
    if max(1, round(share * count)) >= count:
        with pytest.raises(CheckpointError, match="leaves none to train on"):
            mixture.held_out(share)
        return
    train, held = mixture.held_out(share)
    assert len(train) + len(held) == len(mixture)
    sides = [{example.input_ids[0] for example in side} for side in (train, held)]
    assert not sides[0] & sides[1]
    assert len(sides[1]) == max(1, round(share * count))
    assert common_records(held, train) == 0 and common_records(held, mixture) == len(held)
    again = Mixture([examples_from(0, count, copies)]).held_out(share)[1]
    assert {example.input_ids[0] for example in again} == sides[1]


@pytest.mark.parametrize("share", [0, 1, 1.5, float("nan"), True])
def test_a_share_is_between_nothing_and_all(share: float) -> None:
    with pytest.raises(ConfigError, match="must be above 0 and below 1"):
        Mixture([examples_from(0, 9)]).held_out(share)
