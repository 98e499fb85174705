"""The bytes of a base in shares of several processes, counted: held, gathered and received.

A forward pass gathers each unit (sharding/units.py) once, and a unit that is both embedding and head twice; a backward
pass gathers each block once more, whether blocks are recomputed or not. Of a gather, a process receives the shares of
all others.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from qlora_lite.sharding.base import places_of_units
from qlora_lite.sharding.units import share_bytes
from qlora_lite.surgery import repeated_blocks


@dataclass(frozen=True)
class BaseInShares:
    """The bytes of a base in a process that holds a share of it.

    whole: of the packed weights, embedding and head together. share: what a process holds of them. gathered: at most,
    while a step runs: the two largest units, the one that is computed and the next. received: by a process, for each
    batch of a step.
    """

    processes: int
    whole: int
    share: int
    gathered: int
    received: int

    @property
    def saved(self) -> int:
        """What a process takes less than with the whole base, while a step runs; below 0 if it takes more."""
        return self.whole - self.share - self.gathered


def shares_of_model(model: nn.Module, processes: int) -> BaseInShares:
    """Counts the bytes of a model that holds its base whole, real or fake, as if it were in shares."""
    in_blocks = {id(module) for block in repeated_blocks(model) for module in block.modules()}
    whole, shares, received = 0, list[int](), 0
    for places in places_of_units(model, _is_frozen):
        share = share_bytes(places, processes)
        holders = [module for place in places for module, _ in place.holders]
        passes = 2 if id(holders[0]) in in_blocks else len(holders)
        whole += sum(place.nbytes for place in places)
        shares.append(share)
        received += passes * share * (processes - 1)
    gathered = sum(sorted(shares)[-2:]) * processes
    return BaseInShares(processes, whole, sum(shares), gathered, received)


def _is_frozen(tensor: Tensor) -> bool:
    return not tensor.requires_grad
