"""peft's LoRA layer around a packed embedding. Merging never writes to the base: merged values stand beside it."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_lite.checks import cast_finite
from qlora_lite.compute.weight_update import Delta


class PackedEmbedding(lora.Embedding):  # type: ignore[misc]
    """peft's LoRA layer around a packed embedding: y_t = W0[t] + scaling * (A[:, t])^T B^T.

    Merged, the layer uses values that are computed beside the base. A tied output head keeps the base's.
    """

    merged_weight: Tensor | None
    merged_adapters: list[str]

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **options)
        self.register_buffer("merged_weight", None, persistent=False)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.num_embeddings, module.embedding_dim

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        return base_layer.weight.device, base_layer.output_dtype

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type | None]:
        """Plain LoRA alone."""
        return {(): None}

    def _embed(self, input: Tensor, weight: Tensor, input_fn: object = None, output_fn: object = None) -> Tensor:
        return F.embedding(input, weight, self.get_base_layer().padding_idx)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Returns y. adapter_names: an adapter for each row of x, as in peft."""
        self._check_forward_args(x, *args, **options)
        if self.merged_weight is not None and not self.disable_adapters:
            return F.embedding(x, self.merged_weight, self.get_base_layer().padding_idx)
        y: Tensor = super().forward(x, *args, **options)
        return y

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Makes the layer use merged values, and leaves the base as it is. NaN is refused in any case."""
        wanted = check_adapters_to_merge(self, adapter_names)
        names = [name for name in wanted if name in self.lora_embedding_A]
        if not names:
            return
        base, merged = self.get_base_layer(), [*self.merged_adapters, *names]
        weight: Tensor = base.weight.dequantize(torch.float32)
        for name in merged:
            lora_A, lora_B = self.lora_embedding_A[name].float(), self.lora_embedding_B[name].float()
            weight = Delta(lora_A.T.contiguous(), lora_B.T.contiguous(), self.scaling[name]).add_to_(weight, 0)
        self.merged_weight = cast_finite(weight, base.output_dtype, f"the embedding merged with {', '.join(merged)}")
        self.merged_adapters = merged

    def unmerge(self) -> None:
        """Drops the merged values."""
        self.merged_weight = None
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Returns the base layer, or if an adapter is merged, a plain embedding with the merged values."""
        base = self.get_base_layer()
        if merge:
            self.merge(safe_merge, adapter_names)
        if self.merged_weight is None:
            return base  # type: ignore[no-any-return]
        layer: nn.Module = nn.Embedding.from_pretrained(self.merged_weight, padding_idx=base.padding_idx)
        return layer.train(base.training)
