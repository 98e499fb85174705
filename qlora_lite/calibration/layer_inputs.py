"""Collects the inputs of the layers of one block while text runs through it.

Layers that get the same tensor (query, key and value; gate and up) are a group, and are packed for the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

MASK = "attention_mask"


@contextmanager
def noted_inputs(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Tensor]]]:
    """Yields the inputs that each layer gets within the block, by name."""
    noted: dict[str, list[Tensor]] = {}

    def hook(name: str) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...]) -> None:
            noted.setdefault(name, []).extend(args[:1])

        return note

    with ExitStack() as stack:
        for name, layer in layers.items():
            stack.callback(layer.register_forward_pre_hook(hook(name)).remove)
        yield noted


def token_rows(value: Tensor, batch: Mapping[str, Tensor]) -> Tensor | None:
    """Returns the inputs of a layer as `(tokens, features)`, without padding; None unless every token has one."""
    ids = batch["input_ids"]
    if value.shape[:-1].numel() != ids.numel():
        return None
    flat, mask = value.detach().flatten(0, -2), batch.get(MASK)
    return flat if mask is None or mask.dim() != 2 else flat[mask.reshape(-1) != 0]


def token_count(batch: Mapping[str, Tensor]) -> int:
    """Returns the number of tokens of a batch, without padding."""
    mask = batch.get(MASK)
    return batch["input_ids"].numel() if mask is None or mask.dim() != 2 else int((mask != 0).sum())


class _Reached(Exception):
    """A layer was called, and the rest of the block is not needed."""


def input_of(layer: nn.Module, run: Callable[[], object]) -> Tensor | None:
    """Returns the input that a layer gets when `run` is called, which ends there; None if the layer is not called."""
    seen: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.extend(args[:1])
        raise _Reached

    handle = layer.register_forward_pre_hook(note)
    try:
        run()
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0] if seen else None


@dataclass
class BlockInputs:
    """The inputs of a block's layers in the 16-bit model, of all batches.

    leader: of each layer, the first one that gets the same tensor. rows: of each batch, `(tokens, columns)` by leader.
    incomplete: layers that were not called exactly once with every token of a batch.
    """

    layers: Mapping[str, nn.Module]
    leader: dict[str, str] = field(default_factory=dict)
    rows: list[dict[str, Tensor]] = field(default_factory=list)
    incomplete: set[str] = field(default_factory=set)

    def add(self, noted: Mapping[str, list[Tensor]], batch: Mapping[str, Tensor]) -> None:
        """Adds the inputs of a batch, as `noted_inputs` has them."""
        first: dict[int, str] = {}
        self.rows.append({})
        uncalled = [name for name in self.layers if name not in noted]
        for name in [*noted, *uncalled]:  # in the order of the calls
            values = noted.get(name, [])
            rows = token_rows(values[0], batch) if len(values) == 1 else None
            leader = first.setdefault(id(values[0]), name) if rows is not None else name
            # A layer that shares its input in one batch and not in another is left out too.
            if rows is None or self.leader.setdefault(name, leader) != leader:
                self.incomplete.add(name)
            elif leader == name:
                self.rows[-1][name] = rows

    def groups(self) -> list[list[str]]:
        """Returns the layers whose inputs are known for all tokens, by group, in the order in which they are called."""
        found: dict[str, list[str]] = {}
        for name, leader in self.leader.items():
            if name not in self.incomplete and leader not in self.incomplete:
                found.setdefault(leader, []).append(name)
        return [*found.values()]
