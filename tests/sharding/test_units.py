"""Tests of units and of the window, with processes that are threads of nobody: their shares are joined here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from qlora_lite.sharding.units import ALIGNMENT, Place, Unit, Window


class OneOf:
    """Process `index` of `count`, which gets the shares of the others from `shares`."""

    device = torch.device("cpu")

    def __init__(self, index: int, count: int) -> None:
        self.index, self.count = index, count
        self.shares: dict[int, list[Tensor]] = {}
        self.gathered: list[int] = []

    def gather(self, own: Tensor, into: Tensor) -> Callable[[], None]:
        self.gathered.append(id(own))
        into.copy_(torch.cat(self.shares[id(own)]))
        return lambda: None


class Holder(nn.Module):
    """Holds buffers of several dtypes, as a packed weight does."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__()
        for number, size in enumerate(sizes):
            values = torch.arange(size).remainder(100)
            dtype = (torch.uint8, torch.float32, torch.int8)[number % 3]
            self.register_buffer(f"b{number}", values.to(dtype))


def units_of(count: int, sizes: list[int]) -> tuple[list[Unit], list[OneOf], list[Holder], list[Tensor]]:
    """The same unit in each of some processes, its shares filled and exchanged."""
    groups: list[Any] = [OneOf(index, count) for index in range(count)]
    holders = [Holder(sizes) for _ in range(count)]
    wanted = list(holders[0].buffers())
    units = []
    for group, holder in zip(groups, holders, strict=True):
        names = [name for name, _ in holder.named_buffers()]
        unit = Unit([Place.of([(holder, name)]) for name in names], group, Window())
        for place, tensor in zip(unit.places, wanted, strict=True):
            part = unit.part(place)
            part.into.copy_(tensor.view(torch.uint8)[part.start : part.stop])
        units.append(unit)
    for group, unit in zip(groups, units, strict=True):
        group.shares[id(unit.own)] = [other.own for other in units]
    return units, groups, holders, wanted


@settings(max_examples=40)
@given(st.integers(1, 5), st.lists(st.integers(1, 300), min_size=1, max_size=5))
def test_shares_are_equal_and_together_the_tensors(count: int, sizes: list[int]) -> None:
    units, groups, holders, wanted = units_of(count, sizes)
    assert len({len(unit.own) for unit in units}) == 1 and len(units[0].own) % ALIGNMENT == 0
    assert units[0].nbytes == sum(tensor.nbytes for tensor in wanted)
    for unit, holder in zip(units, holders, strict=True):
        away = list(holder.buffers())
        assert [(a.shape, a.dtype) for a in away] == [(w.shape, w.dtype) for w in wanted]
        assert all(
            a.untyped_storage().nbytes() <= 4 and not torch.equal(a, w)
            for a, w in zip(away, wanted, strict=True)
            if w.any()
        )
        unit.need()
        assert all(torch.equal(here, tensor) for here, tensor in zip(holder.buffers(), wanted, strict=True))
        assert all(here.data_ptr() % here.element_size() == 0 for here in holder.buffers())
        unit.leave()
        assert all(now is then for now, then in zip(holder.buffers(), away, strict=True))
    assert all(len(group.gathered) == 1 for group in groups)


def test_the_window_holds_one_unit_and_learns_which_comes_next() -> None:
    group: Any = OneOf(0, 1)
    window, holders, units = Window(), [Holder([7]) for _ in range(3)], []
    for holder in holders:
        unit = Unit([Place.of([(holder, "b0")])], group, window)
        group.shares[id(unit.own)] = [unit.own]
        units.append(unit)
    numbers = {id(unit.own): number for number, unit in enumerate(units)}
    there_and_back = [0, 1, 2, 1, 0]
    for _ in range(2):
        for number in there_and_back:
            units[number].need()
            units[number].need()  # it is here
            here = [holder.b0.untyped_storage().nbytes() > 1 for holder in holders]
            assert here == [other == number for other in range(3)]
    found = [numbers[own] for own in group.gathered]
    # Two passes need 10 units, of which the last is the next one's first; then the next one is on its way.
    assert found == [0, 1, 2, 1, 0, 1, 2, 1, 0, 1]
    window.empty()
    assert all(holder.b0.untyped_storage().nbytes() == 1 for holder in holders)


def test_a_matrix_that_is_away_is_nan_and_tied_modules_hold_one_tensor() -> None:
    group: Any = OneOf(0, 1)
    one, two = nn.Linear(3, 2, bias=False), nn.Linear(3, 2, bias=False)
    two.weight = one.weight
    unit = Unit([Place.of([(one, "weight"), (two, "weight")])], group, Window())
    group.shares[id(unit.own)] = [unit.own]
    assert one.weight is two.weight and isinstance(one.weight, nn.Parameter) and not one.weight.requires_grad
    assert torch.isnan(one(torch.ones(1, 3))).all()
    unit.need()
    assert one.weight is two.weight and not one.weight.isnan().any()


@pytest.mark.parametrize("index", range(3))
def test_a_part_lies_in_the_share(index: int) -> None:
    group: Any = OneOf(index, 3)
    holder = Holder([100, 40])
    unit = Unit([Place.of([(holder, "b0")]), Place.of([(holder, "b1")])], group, Window())
    parts = [unit.part(place) for place in unit.places]
    assert [part.stop - part.start for part in parts] == [len(part.into) for part in parts]
    assert parts[0].start == min(100, index * len(unit.own))
