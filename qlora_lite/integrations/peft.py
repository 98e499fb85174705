"""peft's own API on a packed base: `get_peft_model(model, lora_config(model, ...))`.

The layers are peft's, so that everything of peft and trl works on them: several adapters, `disable_adapter`,
`set_adapter`, saving, DPO's reference. Their forward is the fused product of compute/lora_linear.py, and merging never
writes to the base.

peft makes other layers than its own for a type of layer that is registered with the configuration
(`LoraConfig._register_custom_module`). It has no registration for all configurations, so `lora_config` makes one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners import lora
from peft.tuners.lora.layer import LoraVariant
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.nn import functional as F

from qlora_lite.checks import cast_finite
from qlora_lite.compute.lora_linear import adapted_linear, check_features, dense_slices, dequantized, with_gain
from qlora_lite.compute.weight_update import Delta
from qlora_lite.errors import ConfigError, TargetError, listing
from qlora_lite.lora.config import ALL_LINEAR
from qlora_lite.lora.config import LoraConfig as Selection
from qlora_lite.lora.peft.config_json import peft_target_modules
from qlora_lite.lora.targets import select_targets
from qlora_lite.quantization.experts import PackedStack
from qlora_lite.quantization.layers import QuantizedEmbedding, QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.surgery import name_matches

DORA = "use_dora"
# Values of init_lora_weights that do not read the base's weight. peft's others read it as a tensor, or change it.
INITIALIZATIONS = (True, False, "gaussian")
# peft's options that other code of peft than the layers here carries out on a weight, which it takes for a tensor.
REFUSED = (
    *("arrow_config", "use_bdlora", "alora_invocation_tokens", "velora_config", "monteclora_config", "kasa_config"),
    *("megatron_config", "layer_replication", "loftq_config", "corda_config", "eva_config", "lora_ga_config"),
    *("target_parameters", "ensure_weight_tying"),
)


class Magnitude(nn.Module):
    """The magnitudes m `(out,)` of a DoRA adapter, under the name that peft gives them."""

    def __init__(self, values: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(values)


class PackedDora(LoraVariant):  # type: ignore[misc]
    """DoRA (arXiv:2402.09353) on a `PackedLinear`, which computes it."""

    @staticmethod
    def init(module: PackedLinear, adapter_name: str, **options: object) -> None:
        """Adds magnitudes that leave the output of the layer as it is without them."""
        if not module.lora_magnitude_vector:
            module.adapter_layer_names = (*module.adapter_layer_names, "lora_magnitude_vector")
        norms = module.output_norms(adapter_name).to(module.lora_A[adapter_name].weight.dtype)
        module.lora_magnitude_vector[adapter_name] = Magnitude(norms)


class PackedLinear(lora.Linear):  # type: ignore[misc]
    """peft's LoRA layer around a linear layer whose weight is packed, or plain:

        y = W0 x + b + scaling * B A dropout(x)

    computed as one node (`adapted_linear`), with further active adapters added to it. With DoRA, an adapter gives
    m / n (W0 x + scaling * B A dropout(x)) + b, n being the norms of the rows of W0 + scaling * B A.

    Merged, the layer uses a weight that is computed beside the base, in fp32 and cast to the base's plain dtype.
    """

    merged_weight: Tensor | None

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **options: Any) -> None:
        super().__init__(base_layer, adapter_name, config=config, **options)
        self.fan_in_fan_out = False  # packed, a weight is (out, in)
        self.register_buffer("merged_weight", None, persistent=False)

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.in_features, module.out_features

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
        for part, rows in dense_slices(self.get_base_layer().weight, torch.empty(0)):
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
            compute_dtype=getattr(base, "compute_dtype", None),
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
            plain = adapted_linear(x, base.weight, compute_dtype=getattr(base, "compute_dtype", None))
            for adapter in others:
                y = y + (self._product(x, adapter) - plain)
        return y if base.bias is None else y + base.bias.to(y.dtype)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Returns y. adapter_names: an adapter for each row of x, as in peft."""
        self._check_forward_args(x, *args, **options)
        names = options.pop("adapter_names", None)
        check_features(x, self.in_features)
        if names is not None:
            mixed: Tensor = self._mixed_batch_forward(x, *args, adapter_names=names, **options)
            return mixed
        if self.disable_adapters and self.merged:
            self.unmerge()
        active = [adapter for adapter in self.active_adapters if adapter in self.lora_A]
        if self.merged_weight is not None:
            bias = self.get_base_layer().bias
            return F.linear(x, self.merged_weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        if self.disable_adapters or not active:
            return self.base_layer(x)  # type: ignore[no-any-return]
        return self._with_adapters(x, active)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Makes the layer use a merged weight, and leaves the base as it is. NaN is refused in any case."""
        base = self.get_base_layer()
        for adapter in check_adapters_to_merge(self, adapter_names):
            if adapter not in self.lora_A:
                continue
            if self.lora_bias[adapter]:
                raise ConfigError("an adapter with lora_bias is merged by export_merged, which writes the bias too")
            if self.merged_weight is not None and self._is_dora(adapter):
                raise ConfigError("several adapters of which one is DoRA cannot be merged into one weight")
            weight = dequantized(base.weight, torch.float32) if self.merged_weight is None else self.merged_weight
            weight = self._delta(adapter).add_to_(weight.to(torch.float32, copy=True), 0)
            self.merged_weight = cast_finite(weight, base.weight.dtype, f"the weight merged with {adapter}")
            self.merged_adapters.append(adapter)

    def unmerge(self) -> None:
        """Drops the merged weight."""
        self.merged_weight = None
        self.merged_adapters.clear()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Returns the base layer, or an unpacked linear layer with the merged weight (`merge_and_unload`)."""
        base = self.get_base_layer()
        if not merge:
            return base  # type: ignore[no-any-return]
        self.merge(safe_merge, adapter_names)
        if self.merged_weight is None:
            return base  # type: ignore[no-any-return]
        with torch.device("meta"):
            layer = nn.Linear(self.in_features, self.out_features, bias=base.bias is not None)
        layer.weight = nn.Parameter(self.merged_weight, requires_grad=False)
        layer.bias = base.bias
        return layer


class PackedEmbedding(lora.Embedding):  # type: ignore[misc]
    """peft's LoRA layer around a packed embedding: y_t = W0[t] + scaling * (A[:, t])^T B^T."""

    def _get_in_out_features(self, module: Any) -> tuple[int, int]:
        return module.num_embeddings, module.embedding_dim

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type | None]:
        """Plain LoRA alone."""
        return {(): None}

    def _embed(self, input: Tensor, weight: Tensor, input_fn: object = None, output_fn: object = None) -> Tensor:
        return F.embedding(input, weight, self.get_base_layer().padding_idx)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raises ConfigError: a packed embedding is merged by export_merged."""
        raise ConfigError("an adapter of a packed embedding cannot be merged in memory; export_merged writes it merged")


def _refused(config: peft.LoraConfig) -> list[str]:
    """Returns the settings of a configuration that these layers do not have."""
    found = [f"{name}={getattr(config, name)!r}" for name in REFUSED if getattr(config, name, None)]
    if config.init_lora_weights not in INITIALIZATIONS:
        found.append(f"init_lora_weights={config.init_lora_weights!r}")
    return found


def _check_whole_modules(model: nn.Module, config: peft.LoraConfig) -> None:
    """Raises TargetError for packed modules whose values would have to be trained themselves."""
    wanted = list(config.modules_to_save or ())
    packed = [
        name
        for name, module in model.named_modules()
        if any(name_matches(name, want) for want in wanted)
        and any(isinstance(part, (PackedWeight, PackedStack)) for part in module.modules())
    ]
    if config.trainable_token_indices and isinstance(model.get_input_embeddings(), QuantizedEmbedding):  # type: ignore[operator]
        packed.append("the input embedding (trainable_token_indices)")
    if packed:
        raise TargetError(
            f"{listing(packed, 4)}: packed weights cannot be trained; leave them unpacked when the model is loaded "
            f"(QuantConfig.skip_modules, embedding_format='none')"
        )


def prepare_(config: peft.LoraConfig, model: nn.Module) -> peft.LoraConfig:
    """Makes a configuration of peft fit for a packed model, and returns it: registers the layers of this file.

    `target_modules="all-linear"` becomes the names of the model's linear layers, packed or not, without the output head
    and what cannot be adapted.
    Raises ConfigError that lists the settings that these layers do not have, and TargetError for packed modules in
    modules_to_save.
    """
    if refused := _refused(config):
        raise ConfigError(
            f"peft's layers around packed weights do not have {', '.join(refused)}; add_lora_ has more of them, and "
            f"save_adapter writes peft's files"
        )
    _check_whole_modules(model, config)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        exclude = config.exclude_modules
        chosen = Selection(exclude_modules=sorted(exclude) if isinstance(exclude, set) else exclude)
        config.target_modules = peft_target_modules([layer.name for layer in select_targets(model, chosen)], model)
    config._register_custom_module({QuantizedLinear: PackedLinear, QuantizedEmbedding: PackedEmbedding})
    return config


def lora_config(model: nn.Module, **settings: Any) -> peft.LoraConfig:
    """Returns `peft.LoraConfig(**settings)` for a packed model, for `peft.get_peft_model` and trl's `peft_config`.

    target_modules is `"all-linear"` by default. Raises the errors of `prepare_`.
    """
    return prepare_(peft.LoraConfig(**{"target_modules": ALL_LINEAR, "task_type": "CAUSAL_LM"} | settings), model)


def load_peft_model(model: nn.Module, folder: str | Path, **options: Any) -> peft.PeftModel:
    """Returns `peft.PeftModel.from_pretrained(model, folder, **options)` for a packed model."""
    config = prepare_(peft.LoraConfig.from_pretrained(str(folder)), model)
    config.inference_mode = not options.get("is_trainable", False)
    return peft.PeftModel.from_pretrained(model, str(folder), config=config, **options)
