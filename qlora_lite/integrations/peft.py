"""peft's own API on a packed base: `get_peft_model(model, peft.LoraConfig(...))`.

The layers are peft's, so that everything of peft and trl works on them: several adapters, `disable_adapter`,
`set_adapter`, saving, DPO's reference. Packed ones compute through our nodes (peft_linear.py, peft_embedding.py).

peft makes other layers than its own for a type of layer that is registered with a configuration
(`LoraConfig._register_custom_module`). It has no registration for all configurations: peft's own `get_peft_model` does
not know packed layers unless `prepare_` or `lora_config` made its configuration. The `get_peft_model` here does that,
and its model does it for the adapters that are added later.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import peft
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from qlora_lite.checkpoints.safetensors_read import stored_tensors
from qlora_lite.errors import CheckpointError, ConfigError, TargetError, listing
from qlora_lite.integrations.peft_embedding import PackedEmbedding
from qlora_lite.integrations.peft_linear import DORA, PackedLinear
from qlora_lite.lora.config import ALL_LINEAR
from qlora_lite.lora.config import LoraConfig as Selection
from qlora_lite.lora.peft.config_json import peft_target_modules
from qlora_lite.lora.peft.keys import BASE_COPY, PREFIX, TENSOR_FILE
from qlora_lite.lora.targets import select_targets
from qlora_lite.quantization.experts import PackedStack
from qlora_lite.quantization.layers import QuantizedEmbedding, QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.surgery import is_below, name_matches
from qlora_lite.weight_readers import described_reads

# Values of init_lora_weights that do not read the base's weight. peft's others read it as a tensor, or change it.
INITIALIZATIONS = (True, False, "gaussian")
# peft's options that other code of peft than the layers here carries out on a weight, which it takes for a tensor.
REFUSED = (
    *("arrow_config", "use_bdlora", "alora_invocation_tokens", "velora_config", "monteclora_config", "kasa_config"),
    *("megatron_config", "layer_replication", "loftq_config", "corda_config", "eva_config", "lora_ga_config"),
    *("use_qalora", "ensure_weight_tying"),
)


def _refused(config: peft.LoraConfig) -> list[str]:
    """Returns the settings of a configuration that these layers do not have."""
    found = [f"{name}={getattr(config, name)!r}" for name in REFUSED if getattr(config, name, None)]
    if config.init_lora_weights not in INITIALIZATIONS:
        found.append(f"init_lora_weights={config.init_lora_weights!r}")
    if config.runtime_config.ephemeral_gpu_offload:
        found.append("ephemeral_gpu_offload=True")
    return found


def _packed_names(model: nn.Module) -> list[str]:
    """Returns the names of packed weights as those of the parameters that they replace."""
    packed = [name for name, module in model.named_modules() if isinstance(module, (PackedWeight, PackedStack))]
    return [name.replace(".base_layer", "") for name in packed]  # an adapted layer keeps its name


def _check_parameters(model: nn.Module, config: peft.LoraConfig) -> None:
    """Raises TargetError for packed weights in target_parameters, which peft would pass over."""
    wanted = config.target_parameters or ()
    packed = [name for name in _packed_names(model) if any(name_matches(name, target) for target in wanted)]
    if packed:
        raise TargetError(
            f"target_parameters name packed weights: {listing(packed, 4)}; name linear layers in target_modules, and "
            f"adapt packed stacks of experts by add_lora_, whose save_adapter writes peft's files"
        )


def _check_whole_modules(model: nn.Module, config: peft.LoraConfig) -> None:
    """Raises TargetError for packed modules whose values would have to be trained themselves."""
    weights, packed = _packed_names(model), []
    for name, module in model.named_modules():
        if any(name_matches(name, wanted) for wanted in config.modules_to_save or ()) and any(
            is_below(weight, [name]) for weight in weights
        ):
            packed.append(name)
        rows = config.trainable_token_indices
        named = any(name_matches(name, wanted) for wanted in rows) if isinstance(rows, dict) else bool(rows)
        if named and isinstance(module, QuantizedEmbedding):
            packed.append(f"{name} (trainable_token_indices)")
    if packed:
        raise TargetError(
            f"{listing(packed, 4)}: packed weights cannot be trained; leave them unpacked when the model is loaded "
            f"(QuantConfig.skip_modules, embedding_format='none')"
        )


def _check_targets(model: nn.Module, config: peft.LoraConfig) -> None:
    """Raises TargetError for targets on which peft's layer would have no effect, and embeddings with DoRA."""
    if config.target_modules is None:  # peft chooses by the type of the model
        return
    found = {name: part for name, part in model.named_modules() if name and check_target_module_exists(config, name)}
    if unseen := described_reads(model, found):
        raise TargetError(f"{listing(unseen, 4, '; ')}; leave them out of target_modules")
    packed = (QuantizedEmbedding, PackedEmbedding)
    if config.use_dora and (names := [name for name, part in found.items() if isinstance(part, packed)]):
        raise TargetError(f"packed embeddings have no DoRA: {listing(names, 4)}; leave them out of target_modules")


def _layer_names(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Returns these names of modules without peft's modules: a base layer has the name of the layer around it."""
    wrappers = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    outer = [name for name, module in model.named_modules() if isinstance(module, wrappers)]
    adapted = {f"{name}.base_layer": name for name in outer}
    return [adapted.get(name, name) for name in names if name in adapted or not is_below(name, outer)]


def _all_linear(model: nn.Module, config: peft.LoraConfig) -> set[str] | str:
    """Returns target_modules for the layers of `"all-linear"`, adapted or not."""
    exclude = config.exclude_modules
    chosen = Selection(exclude_modules=sorted(exclude) if isinstance(exclude, set) else exclude)
    names = _layer_names(model, [layer.name for layer in select_targets(model, chosen)])
    found = peft_target_modules(names, model)
    return found if isinstance(found, str) else set(found)


def prepare_(config: peft.LoraConfig, model: nn.Module) -> peft.LoraConfig:
    """Makes a configuration of peft fit for a packed model, and returns it: registers the layers of this package.

    `target_modules="all-linear"` becomes the names of the model's linear layers, packed or not, without the output head
    and what cannot be adapted.
    Raises ConfigError that lists the settings that these layers do not have, and for other configurations than
    LoraConfig; and TargetError for packed modules in modules_to_save, and targets that would have no effect.
    """
    if not isinstance(config, peft.LoraConfig) or config.peft_type != peft.PeftType.LORA:
        raise ConfigError(f"packed layers have adapters of peft.LoraConfig; got {type(config).__name__}")
    if refused := _refused(config):
        raise ConfigError(
            f"peft's layers around packed weights do not have {', '.join(refused)}; add_lora_ has more of them, and "
            f"save_adapter writes peft's files"
        )
    _check_parameters(model, config)
    _check_whole_modules(model, config)
    if isinstance(config.target_modules, str) and config.target_modules.lower() == ALL_LINEAR:
        config.target_modules = _all_linear(model, config)
    _check_targets(model, config)
    config._register_custom_module({QuantizedLinear: PackedLinear, QuantizedEmbedding: PackedEmbedding})
    return config


def lora_config(model: nn.Module, **settings: Any) -> peft.LoraConfig:
    """Returns `peft.LoraConfig(**settings)` for a packed model, for trl's `peft_config` and peft's own functions.

    target_modules is `"all-linear"` by default. Raises the errors of `prepare_`.
    """
    return prepare_(peft.LoraConfig(**{"target_modules": ALL_LINEAR, "task_type": "CAUSAL_LM"} | settings), model)


class PackedLoraModel(LoraModel):  # type: ignore[misc]
    """peft's LoraModel on a packed base. It prepares the configuration of each adapter that is added."""

    def _check_new_adapter_config(self, config: peft.LoraConfig) -> None:
        super()._check_new_adapter_config(config)
        prepare_(config, self.model)

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
    adapted = peft.get_peft_model(
        model,
        prepare_(copy.deepcopy(peft_config), model),
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
    prepared = prepare_(copy.deepcopy(config), model)
    _check_no_packed_values(model, Path(folder) / (options.get("subfolder") or ""))
    return _adopted(
        peft.PeftModel.from_pretrained(model, str(folder), adapter_name, is_trainable, config=prepared, **options)
    )
