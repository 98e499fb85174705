"""Tests of the order of batches over epochs, and of resuming at a position."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

from qlora_lite.compute.random_state import RandomSources, loader_generators
from qlora_lite.data.stream import BatchStream
from qlora_lite.errors import CheckpointError, TrainingError


def batch(number: int) -> dict[str, torch.Tensor]:
    ids = torch.full((1, 2), number)
    return {"input_ids": ids, "labels": ids}


def stream(batches: Iterable[Any]) -> BatchStream:
    return BatchStream(batches, 100, RandomSources(torch.device("cpu"), loader_generators(batches)))


def take(source: BatchStream, count: int) -> list[int]:
    return [int(each["input_ids"][0, 0]) for each in source.take(count, 1, 1)]


def drawing(count: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batches by torch's global random numbers, which a model's dropout draws from too."""
    for _ in range(count):
        yield batch(int(torch.randint(50, ())))


def loader(workers: int = 0) -> Any:
    return DataLoader([batch(n) for n in range(5)], batch_size=None, shuffle=True, num_workers=workers)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "make", [lambda: [batch(n) for n in range(5)], loader, lambda: loader(1), lambda: map(batch, range(20))]
)
@pytest.mark.parametrize("taken", [3, 5, 13])
def test_goes_on_where_it_was(make: Any, taken: int) -> None:
    first = stream(make())
    before = take(first, taken)
    position, now = first.position(), torch.get_rng_state()
    after = take(first, 7)
    second = stream(make())
    second.skip_to(position)
    torch.set_rng_state(now)
    assert take(second, 7) == after
    if isinstance(make(), list):
        assert before + after == [n % 5 for n in range(taken + 7)]


def test_what_is_not_the_same_is_refused() -> None:
    first = stream(drawing(4))
    take(first, 1)
    torch.rand(())  # dropout
    take(first, 1)
    with pytest.raises(CheckpointError, match="first 2 batches of epoch 1 are not those"):
        stream(drawing(4)).skip_to(first.position())
    with pytest.raises(CheckpointError, match="first 2 batches"):
        stream(drawing(1)).skip_to(first.position())
    listed = stream([batch(1)])
    take(listed, 1)
    with pytest.raises(CheckpointError, match="an epoch had 1 batches, and has 0 here"):
        stream([]).skip_to(listed.position())


def test_an_iterator_ends() -> None:
    with pytest.raises(TrainingError, match="the batches ended in step 1 of 1"):
        take(stream(iter([batch(1)])), 2)
