"""Configurations of peft for packed models: what they may ask for, and the layers that are registered with them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import peft
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from qlora_lite.architecture import config_value, text_config
from qlora_lite.errors import ConfigError, TargetError, listing
from qlora_lite.integrations.peft_embedding import PackedEmbedding
from qlora_lite.integrations.peft_experts import passed_over, wrapped_experts
from qlora_lite.integrations.peft_linear import DORA, PackedLinear
from qlora_lite.lora.config import ALL_LINEAR
from qlora_lite.lora.config import LoraConfig as Selection
from qlora_lite.lora.peft.config_json import peft_target_modules
from qlora_lite.lora.peft.lost_layers import RENAMED, lost_in_peft
from qlora_lite.lora.targets import select_targets
from qlora_lite.quantization.experts import PackedStack, RoutedExperts
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


def _unwrapped(name: str) -> str:
    """Returns the name that a part of an adapted layer has without the adapter."""
    return name.replace(".base_layer", "")


def _packed_names(model: nn.Module) -> list[str]:
    """Returns the names of packed weights as those of the parameters that they replace."""
    packed = [name for name, module in model.named_modules() if isinstance(module, (PackedWeight, PackedStack))]
    return [_unwrapped(name) for name in packed]


def _packed_stacks(model: nn.Module) -> list[str]:
    """Returns the names of packed stacks of experts, adapted or not."""
    return [_unwrapped(name) for name, module in model.named_modules() if isinstance(module, PackedStack)]


def _renamed(model: nn.Module) -> Collection[str]:
    """Returns the names in target_modules that peft makes those of stacks, by the type of the model."""
    return RENAMED.get(str(config_value(text_config(getattr(model, "config", None)), "model_type")), ())


def targeted_stacks(config: object, model: nn.Module) -> list[str]:
    """Returns the names of the packed stacks of experts that a configuration targets."""
    wanted, modules = (getattr(config, name, None) or () for name in ("target_parameters", "target_modules"))
    stacks, renamed = _packed_stacks(model), _renamed(model)
    if not isinstance(modules, str) and any(target.rpartition(".")[2] in renamed for target in modules):
        return stacks
    return [name for name in stacks if any(name_matches(name, target) for target in wanted)]


def _check_parameters(model: nn.Module, config: peft.LoraConfig) -> None:
    """Raises TargetError for packed matrices in target_parameters, ConfigError for settings that stacks do not have."""
    wanted = config.target_parameters or ()
    named = [name for name in _packed_names(model) if any(name_matches(name, target) for target in wanted)]
    stacks = _packed_stacks(model)
    if packed := [name for name in named if name not in stacks]:
        raise TargetError(f"target_parameters name packed layers: {listing(packed, 4)}; name them in target_modules")
    options = {"lora_dropout": config.lora_dropout, DORA: config.use_dora, "lora_bias": config.lora_bias}
    if named and (found := [f"{name}={value!r}" for name, value in options.items() if value]):
        raise ConfigError(f"stacks of experts in target_parameters do not have {', '.join(found)}, as in peft")


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
    model_type = str(config_value(text_config(getattr(model, "config", None)), "model_type"))
    if lost := lost_in_peft(model_type, [name for name, part in found.items() if hasattr(part, "in_features")]):
        raise TargetError("; ".join(lost))
    packed = (QuantizedEmbedding, PackedEmbedding)
    if config.use_dora and (names := [name for name, part in found.items() if isinstance(part, packed)]):
        raise TargetError(f"packed embeddings have no DoRA: {listing(names, 4)}; leave them out of target_modules")
    if only := _targets_of_stacks_alone(config.target_modules, found, _renamed(model)):
        raise TargetError(
            f"target_modules {only} match stacks of experts alone, which are parameters in peft; name them in "
            f"target_parameters"
        )


def _targets_of_stacks_alone(
    targets: set[str] | str, found: Mapping[str, nn.Module], renamed: Collection[str]
) -> list[str]:
    """Returns those targets that match packed stacks and nothing else.

    found: the modules that all targets match. renamed: names that peft itself makes those of parameters.
    """
    matched = (
        {targets: list(found)}
        if isinstance(targets, str)
        else {
            target: [name for name in found if name_matches(name, target)]
            for target in sorted(targets)
            if target.rpartition(".")[2] not in renamed
        }
    )
    return [
        target for target, names in matched.items() if names and all(isinstance(found[n], PackedStack) for n in names)
    ]


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


def fit_(config: peft.LoraConfig, model: nn.Module) -> peft.LoraConfig:
    """Makes a configuration of peft fit for a packed model, and returns it, for use within `stacks_as_parameters`.

    Raises the errors of `prepare_` (peft.py), but for stacks of experts.
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
    layers = {QuantizedLinear: PackedLinear, QuantizedEmbedding: PackedEmbedding}
    config._register_custom_module({**layers, RoutedExperts: wrapped_experts, PackedStack: passed_over})
    return config
