"""Merging in peft's layers around packed weights: merged values stand beside the base, which is never written to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn


class MergedBeside:
    """The part of a layer of peft that merges, in front of peft's class among the bases of a layer.

    A layer uses the values in its forward where `merged_weight` is not None. `_merged_values(adapters)` of the layer
    returns the weight merged with these adapters, and the bias, None where it is that of the base.
    `_plain_layer(base, weight)` makes the layer without adapters that unloading leaves behind.
    """

    # Of the layer.
    _merged_values: Callable[[Sequence[str]], tuple[Tensor, Tensor | None]]
    _plain_layer: Callable[[Any, Tensor], nn.Module]
    # Of peft's layers.
    lora_A: Any
    lora_embedding_A: Any
    merged_adapters: list[str]
    get_base_layer: Any
    register_buffer: Any

    merged_weight: Tensor | None
    merged_bias: Tensor | None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register_buffer("merged_weight", None, persistent=False)
        self.register_buffer("merged_bias", None, persistent=False)

    def check_mergeable(self, adapter_names: Sequence[str]) -> None:
        """Raises ConfigError if one of these adapters of the layer cannot be merged."""

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Makes the layer use merged values, and leaves the base as it is. NaN is refused in any case."""
        wanted = check_adapters_to_merge(self, adapter_names)
        names = [name for name in wanted if name in self.lora_A or name in self.lora_embedding_A]
        if names:
            self.check_mergeable(names)
            merged = [*self.merged_adapters, *names]
            self.merged_weight, self.merged_bias = self._merged_values(merged)
            self.merged_adapters = merged

    def unmerge(self) -> None:
        """Drops the merged values."""
        self.merged_weight = self.merged_bias = None
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Returns the base layer, or if an adapter is merged, a plain layer with the merged values."""
        if merge:
            self.merge(safe_merge, adapter_names)
        base: nn.Module = self.get_base_layer()
        if self.merged_weight is None:
            return base
        return self._plain_layer(base, self.merged_weight).train(base.training)
