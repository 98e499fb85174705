"""peft's LoRA layer around a packed linear layer. Its forward is the fused product of compute/lora_linear.py.

Merging never writes to the base: a merged weight stands beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft.tuners import lora
from peft.tuners.lora.layer import Conv1D, LoraVariant
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_lite.checks import cast_finite
from qlora_lite.compute.lora_linear import adapted_linear, check_features, with_gain
from qlora_lite.compute.products.frozen_weight import dense_slices
from qlora_lite.compute.weight_update import Delta
from qlora_lite.errors import ConfigError
from qlora_lite.integrations.peft_merging import MergedBeside

DORA = "use_dora"


class Magnitude(nn.Module):
    """The magnitudes m `(out,)` of a DoRA adapter, under the name that peft gives them."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)


class PackedDora(LoraVariant):  # type: ignore[misc]
    """DoRA (arXiv:2402.09353) on a `PackedLinear`, which computes it."""

    @staticmethod
    def init(module: PackedLinear, adapter_name: str, **options: object) -> None:
        """Adds magnitudes in fp32 that leave the output of the layer as it is without them.

        A and B on meta (`low_cpu_mem_usage`) give magnitudes on meta, for a file to fill.
        """
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        if module.lora_A[adapter_name].weight.is_meta:
            norms = torch.empty(module.out_features, device="meta")
        else:
            norms = module.output_norms(adapter_name)
        module.lora_magnitude_vector[adapter_name] = Magnitude(norms)


def unpacked_layer(base: Any, weight: Tensor, bias: Tensor | None) -> nn.Module:
    """Returns the plain layer that a packed one was, an nn.Linear or GPT-2's Conv1D, with these frozen values."""
    with torch.device("meta"):
        if base.transposed:
            layer, weight = Conv1D(base.out_features, base.in_features), weight.T.contiguous()
        else:
            layer = nn.Linear(base.in_features, base.out_features, bias=bias is not None)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = bias if bias is None or isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
    return layer  # type: ignore[no-any-return]


class PackedLinear(MergedBeside, lora.Linear):  # type: ignore[misc]
    """peft's LoRA layer around a linear layer whose weight is packed:

        y = W0 x + b + scaling * B A dropout(x)

    computed as one node (`adapted_linear`), with further active adapters added to it. With DoRA, an adapter gives
    m / n (W0 x + scaling * B A dropout(x)) + b, n being the norms of the rows of W0 + scaling * B A.

    Merged, the layer uses a weight that is computed beside the base, in fp32 and cast to the base's plain dtype: W0 and
    the change that each adapter makes of it. The bias is merged the same way.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **options)
        self.fan_in_fan_out = False  # packed, a weight is (out, in)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

    def _get_base_layer_device_and_dtype(self, base_layer: Any) -> tuple[torch.device, torch.dtype]:
        # peft would take the base's compute_dtype, which may be None and would leave the adapter as it is.
        return base_layer.weight.device, base_layer.weight.dtype

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type | None]:
        """The variants of peft that these layers have."""
        return {(): None, (DORA,): PackedDora}

    def _factors(self, adapter: str) -> tuple[Tensor, Tensor]:
        return self.lora_A[adapter].weight, self.lora_B[adapter].weight

    def _delta(self, adapter: str) -> Delta:
        """Returns the update of the weight by an adapter, without gradients."""
        lora_A, lora_B = self._factors(adapter)
        magnitude = self.lora_magnitude_vector[adapter].weight.detach().float() if self._is_dora(adapter) else None
        return Delta(lora_B.detach().float(), lora_A.detach().float(), self.scaling[adapter], magnitude)

    def _is_dora(self, adapter: str) -> bool:
        return adapter in self.lora_magnitude_vector

    def _base_rows(self) -> Iterator[tuple[int, Tensor]]:
        weight = self.get_base_layer().weight
        for part, rows in dense_slices(weight, torch.empty(0, device=weight.device)):
            yield part.start, rows.detach()

    @torch.no_grad()
    def output_norms(self, adapter: str) -> Tensor:
        """Returns n `(out,)` in fp32: the norms of the rows of W0 + scaling * B A."""
        lora_A, lora_B = self._factors(adapter)
        return Delta(lora_B.float(), lora_A.float(), self.scaling[adapter]).norms_of(self._base_rows())

    def _product(self, x: Tensor, adapter: str) -> Tensor:
        """Returns the output of the layer with one adapter, without b."""
        base, dropout = self.get_base_layer(), self.lora_dropout[adapter]
        lora_A, lora_B = self._factors(adapter)
        y = adapted_linear(
            x,
            base.weight,
            None,
            lora_A,
            lora_B,
            scaling=self.scaling[adapter],
            dropout=getattr(dropout, "p", 0.0) if self.training else 0.0,
            compute_dtype=base.compute_dtype,
        )
        if self._is_dora(adapter):
            magnitude = self.lora_magnitude_vector[adapter].weight
            y = with_gain(y, magnitude.float() / self.output_norms(adapter) - 1)
        if self.lora_bias[adapter]:
            y = y + (self.scaling[adapter] * self.lora_B[adapter].bias).to(y.dtype)
        return y

    def _with_adapters(self, x: Tensor, adapters: Sequence[str]) -> Tensor:
        first, *others = adapters
        y, base = self._product(x, first), self.get_base_layer()
        if others:
            plain = adapted_linear(x, base.weight, compute_dtype=base.compute_dtype)
            for adapter in others:
                y = y + (self._product(x, adapter) - plain)
        return y if base.bias is None else y + base.bias.to(y.dtype)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Returns y. adapter_names: an adapter for each row of x, as in peft."""
        self._check_forward_args(x, *args, **options)
        names = options.pop("adapter_names", None)
        check_features(x, self.in_features)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x)  # type: ignore[no-any-return]
        if names is not None:
            mixed: Tensor = self._mixed_batch_forward(x, *args, adapter_names=names, **options)
            return mixed
        if self.merged_weight is not None:
            bias = self.get_base_layer().bias if self.merged_bias is None else self.merged_bias
            return F.linear(x, self.merged_weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        active = [adapter for adapter in self.active_adapters if adapter in self.lora_A]
        return self._with_adapters(x, active) if active else self.base_layer(x)

    def check_mergeable(self, adapter_names: Sequence[str]) -> None:
        """Raises ConfigError if one of these adapters of the layer cannot be merged."""
        if self.get_base_layer().bias is None and any(self.lora_bias.get(adapter) for adapter in adapter_names):
            raise ConfigError(
                "an adapter with lora_bias cannot be merged into a layer without a bias, whose checkpoint has no place "
                "for one; leave it unmerged"
            )

    def _merged_values(self, adapters: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        base, with_bias = self.get_base_layer(), [name for name in adapters if self.lora_bias[name]]
        if not with_bias:
            return self._merged_weight(adapters), None
        added = sum(self.scaling[name] * self.lora_B[name].bias.float() for name in with_bias)
        return self._merged_weight(adapters), (base.bias.float() + added).to(base.bias.dtype)

    def _merged_weight(self, adapters: Sequence[str]) -> Tensor:
        """Returns W0 plus the change that each adapter makes of W0."""
        base = self.get_base_layer()
        weight: Tensor = base.weight.dequantize(torch.float32)
        first, *others = sorted(adapters, key=lambda adapter: not self._is_dora(adapter))  # DoRA scales W0 itself
        weight = self._delta(first).add_to_(weight, 0)
        for adapter in others:
            if self._is_dora(adapter):
                plain = base.weight.dequantize(torch.float32)
                weight -= plain
                weight += self._delta(adapter).add_to_(plain, 0)
            else:
                weight = self._delta(adapter).add_to_(weight, 0)
        return cast_finite(weight, base.weight.dtype, f"the weight merged with {', '.join(adapters)}")

    def _plain_layer(self, base: Any, weight: Tensor) -> nn.Module:
        return unpacked_layer(base, weight, base.bias if self.merged_bias is None else self.merged_bias)
