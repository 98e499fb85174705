"""Units: tensors that are gathered together, and the window of those that are here.

A unit lays its tensors out in one range of bytes, each at a multiple of `ALIGNMENT`, in the order of their names. The
range is cut into equal shares, and process i holds share i. A gather of the shares, one after the other, therefore is
the unit itself: its tensors are views of what was received, and nothing is copied. While a unit is away, placeholders
of the same shape and dtype stand for its tensors, which take no memory: NaN for floats, so that nobody computes with
them unnoticed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qlora_lite.sharding.group import Group

ALIGNMENT = 64


@dataclass
class Place:
    """A tensor of a unit, and the modules that hold it under a name; several if it is tied.

    offset: of its first byte in the unit. away: its placeholder.
    """

    holders: list[tuple[nn.Module, str]]
    shape: torch.Size
    dtype: torch.dtype
    is_parameter: bool
    offset: int = 0
    away: Tensor = field(default_factory=lambda: torch.empty(0))

    @classmethod
    def of(cls, holders: Sequence[tuple[nn.Module, str]]) -> Place:
        """Returns the place of a tensor that these modules hold."""
        module, name = holders[0]
        tensor = getattr(module, name)
        return cls(list(holders), tensor.shape, tensor.dtype, isinstance(tensor, nn.Parameter))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def put(self, tensor: Tensor) -> None:
        """Makes the modules hold this tensor."""
        for module, name in self.holders:
            (module._parameters if self.is_parameter else module._buffers)[name] = tensor  # type: ignore[assignment]

    def hide(self, device: torch.device) -> None:
        """Makes the placeholder, and puts it in the place of the tensor."""
        one = torch.zeros((), dtype=self.dtype, device=device)
        away = (one.fill_(torch.nan) if one.is_floating_point() else one).expand(self.shape)
        self.away = nn.Parameter(away, requires_grad=False) if self.is_parameter else away
        self.put(self.away)

    def view_in(self, whole: Tensor) -> Tensor:
        """Returns the tensor in the bytes of its unit."""
        found = whole[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)
        return nn.Parameter(found, requires_grad=False) if self.is_parameter else found


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def share_bytes(places: Sequence[Place], count: int) -> int:
    """Returns the bytes of each of `count` equal shares of these places."""
    return _aligned(-(-sum(_aligned(place.nbytes) for place in places) // count))


@dataclass(frozen=True)
class OwnPart:
    """The bytes `start` to `stop` of a tensor that this process holds; `into` are those bytes in its share."""

    start: int
    stop: int
    into: Tensor


class Unit:
    """Tensors that are gathered together. The share of this process begins as zeros.

    After construction the tensors are away.
    """

    def __init__(self, places: Sequence[Place], group: Group, window: Window) -> None:
        self.places, self._group, self._window = list(places), group, window
        end = 0
        for place in self.places:
            place.offset = end
            end += _aligned(place.nbytes)
        self.nbytes = sum(place.nbytes for place in self.places)
        size = share_bytes(self.places, group.count)
        self.own = torch.zeros(size, dtype=torch.uint8, device=group.device)
        for place in self.places:
            place.hide(group.device)

    def need(self) -> None:
        """Makes the tensors be here, until another unit is needed. Every process must call it, in the same order."""
        self._window.need(self)

    def part(self, place: Place) -> OwnPart:
        """Returns what this process holds of a tensor."""
        first = self._group.index * len(self.own)
        start, stop = (min(max(edge - place.offset, 0), place.nbytes) for edge in (first, first + len(self.own)))
        begin = place.offset + start - first
        return OwnPart(start, stop, self.own[begin : begin + stop - start] if start < stop else self.own[:0])

    def gather(self) -> Callable[[], Tensor]:
        """Begins to gather the unit; returns a function that waits for its bytes."""
        whole = torch.empty(len(self.own) * self._group.count, dtype=torch.uint8, device=self.own.device)
        wait = self._group.gather(self.own, whole)

        def received() -> Tensor:
            wait()
            return whole

        return received

    def arrive(self, whole: Tensor) -> None:
        """Puts the tensors into their modules."""
        for place in self.places:
            place.put(place.view_in(whole))

    def leave(self) -> None:
        """Puts the placeholders back. What autograd has saved of the tensors stays alive with it."""
        for place in self.places:
            place.put(place.away)


class Window:
    """The unit that is here, and the one that will be needed next, which is gathered meanwhile.

    Which one is next is known from the last time: behind the two units that were needed last comes the one that came
    behind them before. All processes need the same units in the same order, so all gather the same.
    """

    def __init__(self) -> None:
        self._before: Unit | None = None
        self._here: Unit | None = None
        self._coming: tuple[Unit, Callable[[], Tensor]] | None = None
        self._next: dict[tuple[Unit | None, Unit | None], Unit] = {}

    def need(self, unit: Unit) -> None:
        """Makes a unit the one that is here."""
        if unit is self._here:
            return
        self._next[self._before, self._here] = unit
        self._before = self._here
        if self._before is not None:
            self._before.leave()
        self._here = None
        received = self._take(unit)
        unit.arrive(received())
        self._here = unit
        following = self._next.get((self._before, unit))
        if following is not None:
            self._coming = following, following.gather()

    def _take(self, unit: Unit) -> Callable[[], Tensor]:
        """Returns the wait for a unit: of the gather that has begun, if it is this one's."""
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] is unit:
            return coming[1]
        if coming is not None:
            coming[1]()
        return unit.gather()

    def empty(self) -> None:
        """Lets all units leave, and waits for what is under way."""
        if self._coming is not None:
            self._coming[1]()
        if self._here is not None:
            self._here.leave()
        self._before = self._here = self._coming = None
