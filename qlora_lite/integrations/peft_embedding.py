"""peft's LoRA layer around a packed embedding. Merging never writes to the base: merged values stand beside it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft.tuners import lora
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_lite.checks import cast_finite
from qlora_lite.compute.weight_update import Delta
from qlora_lite.integrations.peft_merging import MergedBeside


class PackedEmbedding(MergedBeside, lora.Embedding):  # type: ignore[misc]
    """peft's LoRA layer around a packed embedding: y_t = W0[t] + scaling * (A[:, t])^T B^T.

    Merged, the layer uses values that are computed beside the base. A tied output head keeps the base's.
    """

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

    def _merged_values(self, adapters: Sequence[str]) -> tuple[Tensor, None]:
        base = self.get_base_layer()
        weight: Tensor = base.weight.dequantize(torch.float32)
        for name in adapters:
            lora_A, lora_B = self.lora_embedding_A[name].float(), self.lora_embedding_B[name].float()
            weight = Delta(lora_A.T.contiguous(), lora_B.T.contiguous(), self.scaling[name]).add_to_(weight, 0)
        return cast_finite(weight, base.output_dtype, f"the embedding merged with {', '.join(adapters)}"), None

    def _plain_layer(self, base: Any, weight: Tensor) -> nn.Module:
        layer: nn.Module = nn.Embedding.from_pretrained(weight, padding_idx=base.padding_idx)
        return layer
