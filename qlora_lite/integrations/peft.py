"""peft's own API on a packed base: `get_peft_model(model, peft.LoraConfig(...))`.

The layers are peft's, so that everything of peft and trl works on them: several adapters, `disable_adapter`,
`set_adapter`, saving, DPO's reference. Packed ones compute through our nodes (peft_linear.py, peft_embedding.py,
peft_experts.py).

peft makes other layers than its own for a type of layer that is registered with a configuration
(`LoraConfig._register_custom_module`). It has no registration for all configurations: peft's own `get_peft_model` does
not know packed layers unless `prepare_` or `lora_config` made its configuration. The `get_peft_model` here does that,
and its model does it for the adapters that are added later.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import peft
from peft.tuners.lora import LoraModel
from torch import nn

from qlora_lite.checkpoints.safetensors_read import stored_tensors
from qlora_lite.errors import CheckpointError, ConfigError, TargetError, listing
from qlora_lite.integrations.peft_config import fit_, targeted_stacks
from qlora_lite.integrations.peft_embedding import PackedEmbedding
from qlora_lite.integrations.peft_experts import stacks_as_parameters
from qlora_lite.integrations.peft_linear import DORA, PackedLinear
from qlora_lite.lora.config import ALL_LINEAR
from qlora_lite.lora.peft.keys import BASE_COPY, PREFIX, TENSOR_FILE
from qlora_lite.quantization.packed_weight import PackedWeight


def prepare_(config: peft.LoraConfig, model: nn.Module) -> peft.LoraConfig:
    """Makes a configuration of peft fit for a packed model, and returns it: registers the layers of this package.

    `target_modules="all-linear"` becomes the names of the model's linear layers, packed or not, without the output head
    and what cannot be adapted.
    Raises ConfigError that lists the settings that these layers do not have, and for other configurations than
    LoraConfig; and TargetError for packed modules in modules_to_save, targets that would have no effect, and packed
    stacks of experts, which peft itself does not find.
    """
    if stacks := targeted_stacks(config, model):
        raise TargetError(
            f"the targets are packed stacks of experts, which peft passes over: {listing(stacks, 4)}; adapt the model "
            f"by get_peft_model of qlora_lite.integrations"
        )
    return fit_(config, model)


def lora_config(model: nn.Module, **settings: Any) -> peft.LoraConfig:
    """Returns `peft.LoraConfig(**settings)` for a packed model, for trl's `peft_config` and peft's own functions.

    target_modules is `"all-linear"` by default. Raises the errors of `prepare_`.
    """
    return prepare_(peft.LoraConfig(**{"target_modules": ALL_LINEAR, "task_type": "CAUSAL_LM"} | settings), model)


class PackedLoraModel(LoraModel):  # type: ignore[misc]
    """peft's LoraModel on a packed base. It prepares the configuration of each adapter that is added."""

    def _check_new_adapter_config(self, config: peft.LoraConfig) -> None:
        super()._check_new_adapter_config(config)
        fit_(config, self.model)

    def inject_adapter(self, model: nn.Module, *args: Any, **options: Any) -> None:
        """Adds an adapter's layers. Packed stacks of experts are found among the parameters."""
        with stacks_as_parameters(model):
            super().inject_adapter(model, *args, **options)

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **options: Any) -> None:
        """Adds a sum of adapters, as in peft. Raises ConfigError for adapters that the sum would not be right for."""
        for option in (DORA, "lora_bias", "use_rslora"):
            if names := [name for name in adapters if getattr(self.peft_config.get(name), option, False)]:
                raise ConfigError(
                    f"add_weighted_adapter adds A and B alone, with plain scaling; {listing(names, 4)} has {option}"
                )
        super().add_weighted_adapter(adapters, *args, **options)

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        # peft warns of these before a merge, which for packed layers changes none of the tied weights.
        names = super()._get_tied_target_modules(model)
        return [n for n in names if not isinstance(model.get_submodule(n), (PackedLinear, PackedEmbedding))]

    def _check_mergeable(self, adapter_names: Sequence[str] | None) -> None:
        """Raises ConfigError before anything is merged if an adapter of a layer cannot be."""
        for name, module in self.model.named_modules():
            if isinstance(module, PackedLinear):
                try:
                    module.check_mergeable(module.active_adapters if adapter_names is None else adapter_names)
                except ConfigError as error:
                    raise ConfigError(f"{name}: {error}") from error

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Merges adapters as in peft. The merged weights stand beside the packed ones."""
        self._check_mergeable(adapter_names)
        super().merge_adapter(adapter_names, safe_merge)

    def _unload_and_optionally_merge(self, merge: bool = True, *args: Any, **options: Any) -> nn.Module:
        if merge:
            self._check_mergeable(options.get("adapter_names"))
        model: Any = super()._unload_and_optionally_merge(merge, *args, **options)
        if getattr(getattr(model, "config", None), "tie_word_embeddings", False):
            head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
            # Of the two, one has merged values now. peft sees this of tensors, not of packed weights.
            if head is not None and head.weight is not embedding.weight:
                model.config.tie_word_embeddings = False
        return model  # type: ignore[no-any-return]


def _adopted(adapted: peft.PeftModel) -> peft.PeftModel:
    """Returns a model of peft whose tuner prepares the configurations that come later.

    peft chooses the class of the tuner by the type of the configuration, so it is exchanged afterwards.
    """
    adapted.base_model.__class__ = PackedLoraModel
    return adapted


def get_peft_model(
    model: nn.Module,
    peft_config: peft.LoraConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> peft.PeftModel:
    """Returns `peft.get_peft_model(model, peft_config, ...)` for a packed model, which gets the adapter in place.

    The arguments are peft's. The configuration is copied. Adapters that are added to the result, by `add_adapter` or
    `load_adapter`, need no preparation. Raises the errors of `prepare_`, and ConfigError for `mixed`.
    """
    if mixed:
        raise ConfigError("packed layers have adapters of peft.LoraConfig alone, so mixed=True has no meaning")
    prepared = fit_(copy.deepcopy(peft_config), model)
    with stacks_as_parameters(model):
        adapted = peft.get_peft_model(
            model,
            prepared,
            adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            revision=revision,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )
    return _adopted(adapted)


def _check_no_packed_values(model: nn.Module, folder: Path) -> None:
    """Raises CheckpointError if an adapter's file has values for packed weights, which peft would pass over.

    peft writes a copy of the base beside an adapted embedding, which is no loss unless it has another shape, and the
    trained values of an embedding that was resized.
    """
    file = folder / TENSOR_FILE
    lost = []
    modules = dict(model.named_modules(remove_duplicate=False))
    for key, stored in stored_tensors(file).items() if file.is_file() else ():
        name = key.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer")
        weight = getattr(modules.get(name), "weight", None)
        if isinstance(weight, PackedWeight) and (not key.endswith(BASE_COPY) or weight.shape != stored.shape):
            lost.append(name)
    if lost:
        raise CheckpointError(
            f"{file} holds values of {listing(lost, 4)}, which are packed in this model; leave them unpacked when it "
            f"is loaded (QuantConfig.skip_modules, embedding_format='none')"
        )


# Arguments of from_pretrained that say where a file is.
OF_FILE = ("subfolder", "revision", "cache_dir", "token", "use_auth_token")


def load_peft_model(
    model: nn.Module, folder: str | Path, adapter_name: str = "default", is_trainable: bool = False, **options: Any
) -> peft.PeftModel:
    """Returns `peft.PeftModel.from_pretrained(model, folder, ...)` for a packed model, which gets the adapter in place.

    The arguments are peft's. Raises the errors of `prepare_`, and CheckpointError for values of packed weights.
    """
    config = options.pop("config", None)
    if config is None:
        where = {name: options[name] for name in OF_FILE if options.get(name) is not None}
        config = peft.PeftConfig.from_pretrained(str(folder), **where)
    if options.get("ephemeral_gpu_offload"):
        raise ConfigError("peft's layers around packed weights do not have ephemeral_gpu_offload=True")
    prepared = fit_(copy.deepcopy(config), model)
    _check_no_packed_values(model, Path(folder) / (options.get("subfolder") or ""))
    with stacks_as_parameters(model):
        adapted = peft.PeftModel.from_pretrained(
            model, str(folder), adapter_name, is_trainable, config=prepared, **options
        )
    return _adopted(adapted)
