"""Auxiliary parameters, trained in addition to A and B: modules_to_save, biases and token rows of a model.

`AuxiliaryTargets` checks these settings of a LoraConfig against a model and wraps the modules that they select.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.errors import TargetError, listing
from qlora_lite.lora.auxiliary_layers import (
    TokenRows,
    TrainableTokensLayer,
    TrainedCopy,
    check_takes_token_rows,
    check_tokens,
    copy_parameters,
    parameter_names,
    unpacked_rows,
)
from qlora_lite.lora.config import LoraConfig
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.quantization.experts import PackedStack
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.surgery import name_matches

# The modules that put trained parameters around a frozen `base_layer`, each with an `adapter_enabled` switch.
WRAPPERS = (LoraLayer, TrainedCopy, TrainableTokensLayer)


def _reason_not_to_save(name: str, module: nn.Module) -> str | None:
    """Returns why the parameters of this module cannot be trained as copies, or None."""
    parameters = {key: value for key, value in module._parameters.items() if value is not None}
    if integers := [key for key, value in parameters.items() if not value.is_floating_point()]:
        return f"{name} holds {integers[0]} in {parameters[integers[0]].dtype}; quantize_base_ converts packed layers"
    if any(key not in module._non_persistent_buffers_set for key in module._buffers):
        return f"{name} keeps buffers ({', '.join(module._buffers)}), which training would change in the base"
    if getattr(module, "max_norm", None) is not None:
        return f"{name} has max_norm, which shortens its weight in place"
    below = [key for key, child in module.named_children() if any(True for _ in child.parameters())]
    if below and parameters:
        return (
            f"{name} has parameters of its own and in its submodules {', '.join(below)}; name modules that have "
            f"parameters in one place only"
        )
    return None


def unwrapped_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Returns every module by its first name as in the model without adapters: wrapped modules in place of wrappers."""
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()

    def visit(name: str, module: nn.Module) -> None:
        while isinstance(module, WRAPPERS):
            module = module.base_layer
        if id(module) in seen:
            return
        seen.add(id(module))
        found[name] = module
        for key, child in module._modules.items():
            if child is not None:
                visit(f"{name}.{key}" if name else key, child)

    visit("", model)
    return found


def modules_with_parameters(modules: Mapping[str, nn.Module], chosen: Collection[str]) -> dict[str, nn.Module]:
    """Returns the chosen modules and their submodules that hold parameters.

    modules: `unwrapped_modules` of the model. Raises TargetError for modules that cannot be trained as copies.
    """
    below = tuple(f"{name}." for name in chosen)
    found, problems = {}, []
    for name, module in modules.items():
        if not (name in chosen or name.startswith(below or ("\n",))):
            continue
        if isinstance(module, PackedStack):
            problems.append(f"{name} is a packed stack of experts, which modules_to_save cannot train")
        if not parameter_names(module):
            continue
        if reason := _reason_not_to_save(name, module):
            problems.append(reason)
        found[name] = module
    if problems:
        raise TargetError("; ".join(dict.fromkeys(problems)))
    return found


def find_modules_to_save(model: nn.Module, wanted: Sequence[str]) -> dict[str, nn.Module]:
    """Returns the modules with parameters that `modules_to_save` selects.

    Raises TargetError for names that match no module and for modules without parameters.
    """
    modules = unwrapped_modules(model)
    with_parameters = {name for name, module in modules.items() if name and parameter_names(module)}
    matching = {want: [name for name in modules if name_matches(name, want)] for want in wanted}
    if unmatched := [want for want, names in matching.items() if not names]:
        has = ", ".join(sorted({name.rpartition(".")[2] for name in with_parameters})) or "none"
        raise TargetError(f"modules_to_save {unmatched} matched no module; this model has: {has}")
    found = {want: modules_with_parameters(modules, names) for want, names in matching.items()}
    if empty := [want for want, inside in found.items() if not inside]:
        raise TargetError(f"modules_to_save {empty} has no parameters to train")
    return {name: module for inside in found.values() for name, module in inside.items()}


def modules_with_bias(modules: Mapping[str, nn.Module]) -> list[str]:
    """Returns the names of those modules that hold a parameter `bias`."""
    return [name for name, module in modules.items() if module._parameters.get("bias") is not None]


def tied_embedding_names(model: nn.Module) -> list[str]:
    """Returns the names of the input embedding and, after it, of the layers that are tied to it.

    Raises TargetError for a model that does not name its input embedding.
    """
    embedding = architecture.input_embedding(model)
    if embedding is None:
        raise TargetError(
            "trainable_token_indices needs the input embedding, and the model has no get_input_embeddings() that "
            "returns it"
        )
    while isinstance(embedding, WRAPPERS):
        embedding = embedding.base_layer
    modules = unwrapped_modules(model)
    first = next(name for name, module in modules.items() if module is embedding)
    pairs = [
        (alias.removesuffix(".weight"), source.removesuffix(".weight"))
        for alias, source in architecture.tied_pairs(model)
    ]
    group = {first, *(name for pair in pairs if first in pair for name in pair)}
    group |= {alias for alias, source in pairs if source in group}
    weight = embedding.weight
    tied = [name for name in group & modules.keys() - {first} if getattr(modules[name], "weight", None) is weight]
    return [first, *sorted(tied)]


@dataclass(frozen=True)
class AuxiliaryTargets:
    """The parameters that are trained in addition to A and B, checked against a model, by names of modules.

    dtype: of the trained copies. modules_to_save: modules all of whose parameters are trained. biases: other modules
    whose bias is trained and that are not adapted. adapted_biases: adapted layers whose bias is trained. tokens: the
    rows that are trained of each of `token_layers`, which share them.
    """

    dtype: torch.dtype
    modules_to_save: Collection[str] = ()
    biases: Collection[str] = ()
    adapted_biases: Collection[str] = ()
    tokens: Sequence[int] = ()
    token_layers: Collection[str] = ()
    _rows: list[TokenRows] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, config: LoraConfig, adapted: Set[str]) -> AuxiliaryTargets:
        """Returns the auxiliary targets of `config`; adapted: names of the layers that get A and B.

        Raises TargetError for settings that contradict each other or the model.
        """
        to_save = find_modules_to_save(model, config.modules_to_save)
        if both := sorted(adapted & to_save.keys()):
            raise TargetError(
                f"{listing(both, 4)} would be both adapted and trained by modules_to_save; leave them out of "
                f"target_modules or of modules_to_save"
            )
        holders = [name for name in modules_with_bias(unwrapped_modules(model)) if name not in to_save]
        adapted_biases = [] if config.bias == "none" else [name for name in holders if name in adapted]
        biases = [name for name in holders if name not in adapted] if config.bias == "all" else []
        if config.bias != "none" and not adapted_biases and not biases:
            which = "no layer of this model" if config.bias == "all" else "none of the adapted layers"
            raise TargetError(f"bias={config.bias!r} has nothing to train: {which} has a bias")
        tokens = tuple(config.trainable_token_indices)
        token_layers = tied_embedding_names(model) if tokens else []
        for name in token_layers:
            base = model.get_submodule(name)
            if name in adapted or name in to_save:
                how = "adapted" if name in adapted else "trained by modules_to_save"
                raise TargetError(f"{name} is {how}, so trainable_token_indices cannot train rows of it too")
            check_takes_token_rows(name, base)
            weight = base.weight
            assert isinstance(weight, (Tensor, PackedWeight))  # it has rows
            check_tokens(tokens, weight.shape[0])
            if name in biases:
                raise TargetError(
                    f"{name} cannot train its bias (bias='all') and rows of its weight (trainable_token_indices)"
                )
        return cls(config.adapter_dtype, tuple(to_save), biases, adapted_biases, tokens, token_layers)

    def wrap(self, name: str, module: nn.Module) -> nn.Module | None:
        """Returns a wrapper that trains the selected parameters of this module, or None if there are none."""
        if name in self.token_layers:
            if not self._rows:
                self._rows.append(TokenRows(self.tokens, unpacked_rows(module, self.tokens, self.dtype)))
            return TrainableTokensLayer(module, self._rows[0])
        names = parameter_names(module) if name in self.modules_to_save else ["bias"] if name in self.biases else None
        return None if names is None else TrainedCopy(module, copy_parameters(module, names, self.dtype))

    def train_biases_(self, layers: Mapping[str, LoraLayer]) -> None:
        """Adds trained biases to the adapted layers that are selected."""
        for name in self.adapted_biases:
            layers[name].train_bias(copy_parameters(layers[name].base_layer, ["bias"], self.dtype)["bias"])


def trained_copies(model: nn.Module) -> dict[str, TrainedCopy]:
    """Returns every TrainedCopy of the model by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TrainedCopy)}


def trainable_tokens_layers(model: nn.Module) -> dict[str, TrainableTokensLayer]:
    """Returns every TrainableTokensLayer of the model by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TrainableTokensLayer)}


def auxiliary_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Returns the trained parameters other than A, B and magnitudes by name; token rows that layers share, once."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        parts: dict[str, nn.Parameter] = {}
        if isinstance(module, LoraLayer) and module.trained_bias is not None:
            parts = {"trained_bias": module.trained_bias}
        elif isinstance(module, TrainedCopy):
            parts = {f"trained.{key}": value for key, value in module.trained.items()}
        elif isinstance(module, TrainableTokensLayer):
            parts = {"rows.values": module.rows.values}
        for key, parameter in parts.items():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{name}.{key}" if name else key] = parameter
    return found
