"""Several sources as one sequence of examples: how often each occurs in an epoch, and what is held out of them."""

from __future__ import annotations

import array
import bisect
import itertools
import random
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import overload

import torch
from torch import Tensor

from qlora_lite.checks import is_finite, require
from qlora_lite.data.batching import epoch_order
from qlora_lite.data.encoding import TokenizedExample
from qlora_lite.data.token_arrays import Examples
from qlora_lite.errors import CheckpointError, ConfigError


class Mixture(Sequence[TokenizedExample]):
    """The examples of several sources, one source after the other.

    weights: the share of each source in an epoch, up to a common factor; None takes every example once in an epoch.
    With weights, an epoch is as long as it can be with no source used up: N = min over sources of
    examples / share, of which each gets its share. An example comes again when all others of its source have come.
    Raises ConfigError for weights that are not positive, and for a number of them that differs from that of `parts`.
    """

    def __init__(self, parts: Sequence[Examples], weights: Sequence[float] | None = None) -> None:
        self.parts = tuple(parts)
        if weights is not None:
            good = len(weights) == len(self.parts) and all(is_finite(weight) and weight > 0 for weight in weights)
            require(good, f"weights must be {len(self.parts)} numbers above 0", list(weights))
        self.weights = None if weights is None else tuple(weight / sum(weights) for weight in weights)
        self._ends = list(itertools.accumulate(len(part) for part in self.parts))

    @property
    def has_images(self) -> bool:
        """Whether any of the sources has images."""
        return any(part.has_images for part in self.parts)

    @cached_property
    def lengths(self) -> Tensor:
        """The tokens of each example (int32)."""
        return torch.cat([part.lengths for part in self.parts])

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> TokenizedExample: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedExample]: ...
    def __getitem__(self, index: int | slice) -> TokenizedExample | list[TokenizedExample]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        number = bisect.bisect_right(self._ends, index)
        return self.parts[number][index - self._first(number)]

    def __iter__(self) -> Iterator[TokenizedExample]:
        return itertools.chain.from_iterable(self.parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def _first(self, number: int) -> int:
        return self._ends[number] - len(self.parts[number])

    def counts(self) -> list[int]:
        """The number of examples of each source in an epoch."""
        sizes = [len(part) for part in self.parts]
        if self.weights is None:
            return sizes
        total = min(size / weight for size, weight in zip(sizes, self.weights, strict=True))
        return [max(1, min(size, round(total * weight))) for size, weight in zip(sizes, self.weights, strict=True)]

    def epoch_order(self, seed: int, epoch: int) -> Sequence[int]:
        """Returns the examples of one epoch, shuffled. The order depends on the arguments and the sizes alone."""
        if self.weights is None:
            return epoch_order(len(self), seed, epoch)
        order = array.array("q")
        for number, count in enumerate(self.counts()):
            first = self._first(number)
            order.extend(first + index for index in self._taken(number, count * epoch, count, seed))
        random.Random(f"{seed} {epoch}").shuffle(order)
        return order

    def _taken(self, number: int, skipped: int, count: int, seed: int) -> Iterator[int]:
        """`count` examples of a source behind the first `skipped`, of its shuffles one after the other."""
        size = len(self.parts[number])
        for shuffle in itertools.count(skipped // size):
            begin = max(0, skipped - shuffle * size)
            order = epoch_order(size, seed, shuffle)[begin : begin + count]
            yield from order
            count -= len(order)
            if count == 0:
                return

    def held_out(self, share: float) -> tuple[Mixture, Mixture]:
        """Returns the examples to train on, and those held out: of each source a share of its records, at least one.

        The digest of a record's tokens decides, so equal records are on the same side, and a record stays on its side
        whatever the seed is. Raises ConfigError for a share that is not between 0 and 1, and CheckpointError for a
        source of which nothing would be left.
        """
        require(is_finite(share) and 0 < share < 1, "the share that is held out must be above 0 and below 1", share)
        sides = [_split(part, share) for part in self.parts]
        return Mixture([kept for kept, _ in sides], self.weights), Mixture([held for _, held in sides])


def _split(examples: Examples, share: float) -> tuple[Examples, Examples]:
    digests = examples.arrays.digests[examples.chosen]
    distinct = digests.unique()  # sorted
    count = max(1, round(share * len(distinct)))
    if count >= len(distinct):
        raise CheckpointError(
            f"a share of {share} of {len(distinct)} different records leaves none to train on; give more records"
        )
    held = digests < distinct[count]
    return tuple(examples.view(examples.chosen[side]) for side in (~held, held))  # type: ignore[return-value]


def mixture_weights(weights: Sequence[float | None]) -> list[float] | None:
    """Returns the weights of sources, None if none has one. Raises ConfigError if only some have."""
    given = [weight for weight in weights if weight is not None]
    if given and len(given) < len(weights):
        raise ConfigError(f"give all sources a weight, or none; got {len(given)} weights for {len(weights)} sources")
    return given or None


def common_records(one: Mixture, other: Mixture) -> int:
    """Returns how many examples of `one` belong to records that `other` has too."""
    digests = [torch.cat([part.arrays.digests[part.chosen] for part in mixture.parts]) for mixture in (one, other)]
    return int(torch.isin(digests[0], digests[1].unique()).sum())
