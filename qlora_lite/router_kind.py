"""How the routers of mixtures of experts apply A and B: transformers' modules that hold one matrix and do more with it.

    scores, experts = route(x; W0 + scaling * B A)       W0 `(experts, in)`

What a router makes of its logits is its own affair, so it computes as it is, with the sum in the place of its weight:
a few experts' rows, which cost nothing beside an expert. peft reaches such a weight by `target_parameters`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from qlora_lite.compute.lora_linear import Adapted
from qlora_lite.compute.weight_update import Delta


class RouterKind:
    def features(self, base: Any) -> tuple[int, int]:
        return base.weight.shape[1], base.weight.shape[0]

    def apply(
        self, layer: Adapted, x: Tensor, weight: Tensor, lora: tuple[Tensor, Tensor] | None, gain: Tensor | None = None
    ) -> Any:
        """What the router returns, be it a tensor or several. The sum is formed in fp32, and is of the router's dtypes.

        (So is what was merged or trained in others: the router multiplies as it is, with tokens of the model's.)
        """
        base: Any = layer.base_layer
        if lora is not None:
            lora_A, lora_B = lora
            with torch.autocast(x.device.type, enabled=False):
                added = layer.scaling * (lora_B.float() @ lora_A.float())
                weight = weight.float() + added
        held = {"weight": weight.to(base.weight.dtype)}
        if layer.bias is not None:
            held["bias"] = layer.bias.to(base.bias.dtype)
        return functional_call(base, held, (x,))

    def upright(self, weight: Tensor) -> Tensor:
        return weight

    def file_shapes(self, base: Any, rank: int) -> dict[str, tuple[int, ...]]:
        width, experts = self.features(base)
        return {"lora_A": (rank, width), "lora_B": (experts, rank)}

    def delta(self, lora_A: Tensor, lora_B: Tensor, scaling: float, magnitude: Tensor | None = None) -> Delta:
        return Delta(lora_B.float(), lora_A.float(), scaling, magnitude)
