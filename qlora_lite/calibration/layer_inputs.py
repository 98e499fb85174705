"""Collects the inputs of the layers of one block while text runs through it, in two states of the layers before it.

Layers that get the same tensor (query, key and value; gate and up) share one `InputProducts`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from qlora_lite.calibration.input_products import InputProducts

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


@dataclass
class BlockInputs:
    """The products of the inputs of a block's layers, summed over batches.

    leader: of each layer, the first one that gets the same tensor. products: by leader. incomplete: layers that were
    not called exactly once with every token of a batch.
    """

    layers: Mapping[str, nn.Module]
    leader: dict[str, str] = field(default_factory=dict)
    products: dict[str, InputProducts] = field(default_factory=dict)
    incomplete: set[str] = field(default_factory=set)

    def add(
        self, plain: Mapping[str, list[Tensor]], packed: Mapping[str, list[Tensor]], batch: Mapping[str, Tensor]
    ) -> None:
        """Adds the inputs of a batch, as `noted_inputs` has them: in the 16-bit model, and behind packed blocks."""
        first: dict[int, str] = {}
        for name in self.layers:
            rows = [self._rows(noted.get(name, []), batch) for noted in (packed, plain)]
            if rows[0] is None or rows[1] is None:
                self.incomplete.add(name)
                continue
            leader = first.setdefault(id(packed[name][0]), name)
            if self.leader.setdefault(name, leader) != leader:  # the layers share in one batch and not in another
                self.incomplete.add(name)
            elif leader == name:
                own = self.products.setdefault(name, InputProducts(rows[0].shape[1], rows[0].device))
                own.add(rows[0], rows[0] if packed[name][0] is plain[name][0] else rows[1])

    @staticmethod
    def _rows(noted: list[Tensor], batch: Mapping[str, Tensor]) -> Tensor | None:
        return token_rows(noted[0], batch) if len(noted) == 1 else None

    def complete(self) -> dict[str, list[str]]:
        """Returns the layers whose inputs are known for all tokens, by leader, those with the most columns first."""
        groups: dict[str, list[str]] = {}
        for name, leader in self.leader.items():
            if name not in self.incomplete and leader not in self.incomplete:
                groups.setdefault(leader, []).append(name)
        columns = {leader: len(products.hessian) for leader, products in self.products.items()}
        return dict(sorted(groups.items(), key=lambda item: -columns[item[0]]))
