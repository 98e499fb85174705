"""What is trained beside A and B: modules as wholes, biases, rows of tokens. Which they are, and the verbs on them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qlora_lite import architecture
from qlora_lite.errors import TargetError, listing
from qlora_lite.lora.auxiliary_layers import (
    TokenRows,
    TrainedCopy,
    WithTokenRows,
    check_takes_rows,
    check_tokens,
    copied,
    parameter_names,
    rows_of,
)
from qlora_lite.lora.config import ALL_LINEAR, LoraConfig
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.quantization.experts import PackedStack
from qlora_lite.surgery import answers_to

WRAPPERS = (LoraLayer, TrainedCopy, WithTokenRows)


def _why_not(name: str, module: nn.Module) -> str | None:
    """Why this module, which holds parameters, cannot be trained whole."""
    own = {key: value for key, value in module._parameters.items() if value is not None}
    if integers := [key for key, value in own.items() if not value.is_floating_point()]:
        return f"{name} holds {integers[0]} in {own[integers[0]].dtype}; quantize_base_ takes over packed layers"
    if any(key not in module._non_persistent_buffers_set for key in module._buffers):
        return f"{name} keeps buffers ({', '.join(module._buffers)}), which training would change in the base"
    if getattr(module, "max_norm", None) is not None:
        return f"{name} has max_norm, which shortens its weight in place"
    below = [key for key, child in module.named_children() if any(True for _ in child.parameters())]
    if below and own:
        return f"{name} has parameters of its own beside those of {', '.join(below)}; name modules that have only one"
    return None


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its first name as it would be without adapters: what is wrapped, under the wrapper's name."""
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


def units(modules: Mapping[str, nn.Module], chosen: Collection[str]) -> dict[str, nn.Module]:
    """The modules that hold the parameters of these modules, which may contain others; TargetError for what cannot be.

    modules: `plain_modules` of the model.
    """
    below = tuple(f"{name}." for name in chosen)
    found, problems = {}, []
    for name, module in modules.items():
        if not (name in chosen or name.startswith(below or ("\n",))):
            continue
        if isinstance(module, PackedStack):
            problems.append(f"{name} is a packed stack, whose matrices cannot be trained whole")
        if not parameter_names(module):
            continue
        if reason := _why_not(name, module):
            problems.append(reason)
        found[name] = module
    if problems:
        raise TargetError("; ".join(dict.fromkeys(problems)))
    return found


def trained_whole(model: nn.Module, wanted: Sequence[str]) -> dict[str, nn.Module]:
    """The modules that `modules_to_save` means. TargetError for unknown names and for modules without parameters."""
    modules = plain_modules(model)
    with_parameters = {name for name, module in modules.items() if name and parameter_names(module)}
    named = {want: [name for name in modules if answers_to(name, want)] for want in wanted}
    if lost := [want for want, names in named.items() if not names]:
        has = ", ".join(sorted({name.rpartition(".")[2] for name in with_parameters})) or "none"
        raise TargetError(f"modules_to_save {lost} matched no module; this model has: {has}")
    found = {want: units(modules, names) for want, names in named.items()}
    if empty := [want for want, inside in found.items() if not inside]:
        raise TargetError(f"modules_to_save {empty} has no parameters to train")
    return {name: module for inside in found.values() for name, module in inside.items()}


def biased(modules: Mapping[str, nn.Module]) -> list[str]:
    """Those of these modules that hold a bias, a parameter of that name."""
    return [name for name, module in modules.items() if module._parameters.get("bias") is not None]


def token_layers(model: Any) -> list[str]:
    """The input embedding, and the layers that are tied to it. TargetError for a model that does not name it."""
    embedding: Any = architecture.input_embedding(model)
    if embedding is None:
        raise TargetError(
            "the model does not say which module is its input embedding: trainable_token_indices needs to know"
        )
    while isinstance(embedding, WRAPPERS):
        embedding = embedding.base_layer
    modules = plain_modules(model)
    name = next(name for name, module in modules.items() if module is embedding)
    pairs = [
        (alias.removesuffix(".weight"), source.removesuffix(".weight"))
        for alias, source in architecture.tied_pairs(model)
    ]
    group = {name, *(one for pair in pairs if name in pair for one in pair)}
    group |= {alias for alias, source in pairs if source in group}
    weight: Any = embedding.weight
    return [name, *sorted(n for n in group & modules.keys() - {name} if getattr(modules[n], "weight", None) is weight)]


@dataclass(frozen=True)
class Beside:
    """What is to be trained beside A and B, checked against a model; the names are those of modules.

    whole: modules of which every parameter is trained. biases: of modules that are neither whole nor adapted.
    adapted_biases: of adapted layers. tokens: whose rows are trained in each of `token_layers`, which share them.
    """

    dtype: torch.dtype
    whole: Collection[str] = ()
    biases: Collection[str] = ()
    adapted_biases: Collection[str] = ()
    tokens: Sequence[int] = ()
    token_layers: Collection[str] = ()
    _rows: list[TokenRows] = field(default_factory=list)

    @classmethod
    def of(cls, model: nn.Module, config: LoraConfig, chosen: set[str]) -> Beside:
        """What `config` means; chosen: the layers that get A and B. TargetError for what cannot be, or is both."""
        whole = trained_whole(model, config.modules_to_save)
        if both := sorted(chosen & whole.keys()):
            raise TargetError(
                f"{listing(both, 4)} would be both adapted and trained whole; leave them out of target_modules or "
                f"of modules_to_save"
            )
        holders = [name for name in biased(plain_modules(model)) if name not in whole]
        adapted_biases = [] if config.bias == "none" else [name for name in holders if name in chosen]
        biases = [name for name in holders if name not in chosen] if config.bias == "all" else []
        if config.bias != "none" and not adapted_biases and not biases:
            which = "no layer of this model" if config.bias == "all" else "none of the adapted layers"
            raise TargetError(f"bias={config.bias!r} has nothing to train: {which} has a bias")
        layers = token_layers(model) if config.trainable_token_indices else []
        for name in layers:
            base: Any = model.get_submodule(name)
            if name in chosen or name in whole:
                how = "adapted" if name in chosen else "trained whole"
                raise TargetError(f"{name} is {how}, so rows of it cannot be trained by trainable_token_indices too")
            check_takes_rows(name, base)
            check_tokens(config.trainable_token_indices, base.weight.shape[0])
            if name in biases:
                raise TargetError(
                    f"{name} cannot train its bias (bias='all') and rows of its weight (trainable_token_indices)"
                )
        return cls(
            config.adapter_dtype, tuple(whole), biases, adapted_biases, tuple(config.trainable_token_indices), layers
        )

    def wrapped(self, name: str, module: nn.Module) -> nn.Module | None:
        """What trains the module of this name beside A and B; None where nothing does."""
        if name in self.token_layers:
            if not self._rows:
                self._rows.append(TokenRows(self.tokens, rows_of(module, self.tokens, self.dtype)))
            return WithTokenRows(module, self._rows[0])
        names = parameter_names(module) if name in self.whole else ["bias"] if name in self.biases else None
        return None if names is None else TrainedCopy(module, copied(module, names, self.dtype))

    def train_biases_(self, layers: Mapping[str, LoraLayer]) -> None:
        """Has adapted layers train their biases."""
        for name in self.adapted_biases:
            layers[name].train_bias(copied(layers[name].base_layer, ["bias"], self.dtype)["bias"])


def left_of(chosen: set[str], model: nn.Module, config: LoraConfig) -> set[str]:
    """The chosen layers without those that `all-linear` would take beside modules_to_save, which names them itself."""
    if config.target_modules != ALL_LINEAR or not config.modules_to_save:
        return chosen
    return chosen - trained_whole(model, config.modules_to_save).keys()


def trained_copies(model: nn.Module) -> dict[str, TrainedCopy]:
    """Every TrainedCopy of the model by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, TrainedCopy)}


def with_token_rows(model: nn.Module) -> dict[str, WithTokenRows]:
    """Every WithTokenRows of the model by name, each once."""
    return {name: module for name, module in model.named_modules() if isinstance(module, WithTokenRows)}


def beside_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained beside A and B, by name; rows that two layers share once."""
    found: dict[str, nn.Parameter] = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        parts: dict[str, Any] = {}
        if isinstance(module, LoraLayer) and module.trained_bias is not None:
            parts = {"trained_bias": module.trained_bias}
        elif isinstance(module, TrainedCopy):
            parts = {f"trained.{key}": value for key, value in module.trained.items()}
        elif isinstance(module, WithTokenRows):
            parts = {"rows.values": module.rows.values}
        for key, parameter in parts.items():
            if id(parameter) not in seen:
                seen.add(id(parameter))
                found[f"{name}.{key}" if name else key] = parameter
    return found
