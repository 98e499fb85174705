"""Tensors that backward gets again from tensors that are kept anyway, instead of keeping them too.

The output of a norm or of a gated activation costs little to make and much to keep: every linear layer that reads it
would hold it until backward. So whoever makes such a tensor gives it a recipe: a function, and the tensors to call it
with, which some other node keeps in any case. A node that would keep the tensor keeps those instead.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


class Again:
    """Makes a tensor again for all nodes that read it in forward: once, and held until the last of them has it."""

    def __init__(self, make: Callable[..., Tensor]) -> None:
        self._make = make
        self._waiting = 0
        self._value: Tensor | None = None

    def will_read(self) -> None:
        """A node announces, in forward, that it will call `read` in backward."""
        self._waiting += 1

    def read(self, parents: tuple[Tensor, ...]) -> Tensor:
        """The tensor, from what the node kept. (More reads than announced, as with retain_graph, make it each time.)"""
        value = self._make(*parents) if self._value is None else self._value
        self._waiting -= 1
        self._value = value if self._waiting > 0 else None
        return value


class Recipe:
    """How a tensor is made again, bit for bit: `make(*parents)`."""

    def __init__(self, make: Callable[..., Tensor], *parents: Tensor, version: int = 0) -> None:
        self.again, self.parents, self.version = Again(make), parents, version


def with_recipe(tensor: Tensor, make: Callable[..., Tensor], *parents: Tensor) -> Tensor:
    """Gives the tensor its recipe, where somebody may need it: while gradients are recorded."""
    if torch.is_grad_enabled():
        tensor.recipe = Recipe(make, *parents, version=tensor._version)  # type: ignore[attr-defined]
    return tensor


def recipe_of(tensor: Tensor) -> Recipe | None:
    """The recipe that came with this very tensor; None for one without, views and copies included.

    None too for a tensor that was changed in place since: it would be made as it was before.
    """
    recipe: Recipe | None = getattr(tensor, "recipe", None)
    return None if recipe is None or recipe.version != tensor._version else recipe
