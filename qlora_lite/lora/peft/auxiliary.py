"""Auxiliary parameters in peft's files: modules_to_save, biases and token rows.

peft's keys: `base_model.model.<module>.<parameter>` for modules_to_save; `….<layer>.base_layer.bias` and
`….<module>.bias` for biases; `….<embedding>.token_adapter.trainable_tokens_delta` for token rows, which are values and
not differences, in the order of the configuration's trainable_token_indices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.checkpoints.lazy_tensors import LazyTensor
from qlora_lite.compute.weight_update import Replacement, Rows
from qlora_lite.errors import CheckpointError, ConfigError, TargetError, listing
from qlora_lite.lora.auxiliary import (
    modules_with_bias,
    modules_with_parameters,
    tied_embedding_names,
    trainable_tokens_layers,
    trained_copies,
    unwrapped_modules,
)
from qlora_lite.lora.auxiliary_layers import (
    TokenRows,
    TrainableTokensLayer,
    TrainedCopy,
    checkpoint_shape,
    parameter_names,
)
from qlora_lite.lora.config import BIASES
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.lora.peft.keys import PREFIX
from qlora_lite.surgery import replace_modules_

ROWS = ".token_adapter.trainable_tokens_delta"
BIAS = ".bias"
ADAPTED_BIAS = ".base_layer.bias"
# With bias="all", peft writes the bias of a module in modules_to_save twice more: the base's own and the trained one.
DUPLICATE_BIASES = (".original_module.bias", ".modules_to_save.bias")


def _selects(wanted: str, name: str) -> bool:
    """Whether a name in modules_to_save selects a module: peft compares the end of its name, not only at dots."""
    return name.endswith(wanted)


def _is_bias_only(copy: TrainedCopy) -> bool:
    return list(copy.trained) == ["bias"] != parameter_names(copy.base_layer)


def _layers_with_bias(model: nn.Module) -> dict[str, LoraLayer]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {name: layer for name, layer in layers.items() if layer.trained_bias is not None}


def _layers_with_rows(model: nn.Module) -> dict[str, TrainableTokensLayer]:
    """Returns one layer for each TokenRows: the input embedding where layers share it, or else the first of them."""
    layers = trainable_tokens_layers(model)
    first = tied_embedding_names(model)[0] if layers else None
    owners: dict[int, str] = {}
    for name in sorted(layers, key=lambda name: name != first):
        owners.setdefault(id(layers[name].rows), name)
    return {name: layers[name] for name in owners.values()}


def auxiliary_tensors(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Yields (peft's key, name of the weight in the plain checkpoint, values) of each auxiliary parameter."""
    for name, copy in trained_copies(model).items():
        for part, values in copy.trained.items():
            yield f"{PREFIX}{name}.{part}", f"{name}.{part}", values
    for name, layer in _layers_with_bias(model).items():
        assert layer.trained_bias is not None
        yield f"{PREFIX}{name}{ADAPTED_BIAS}", f"{name}{BIAS}", layer.trained_bias
    for name, with_rows in _layers_with_rows(model).items():
        yield f"{PREFIX}{name}{ROWS}", f"{name}.weight", with_rows.rows.values


def auxiliary_config(model: nn.Module) -> dict[str, object]:
    """Returns the options of peft's configuration for the auxiliary parameters of a model.

    Raises ConfigError for modules whose names would make peft train other modules too.
    """
    copies = trained_copies(model)
    saved = sorted(name for name, copy in copies.items() if not _is_bias_only(copy))
    for name in saved:
        if others := [other for other in unwrapped_modules(model) if other != name and _selects(name, other)]:
            raise ConfigError(
                f"peft would apply modules_to_save={name!r} to {listing(others, 4)} too, whose names end with it; "
                f"add these to modules_to_save as well, or put the model into a container"
            )
    biases = "all" if len(copies) > len(saved) else "lora_only" if _layers_with_bias(model) else "none"
    rows = {name: list(layer.rows.indices) for name, layer in _layers_with_rows(model).items()}
    return {"bias": biases, "modules_to_save": saved or None, "trainable_token_indices": rows or None}


@dataclass(frozen=True)
class StoredAuxiliary:
    """The auxiliary parameters in an adapter's files.

    modules: {module: {parameter: values}} of modules_to_save. biases: {module: values}; adapted: those of these modules
    that have A and B too. rows: {layer: (tokens, values)}. problems: why the model cannot take them.
    """

    modules: dict[str, dict[str, Tensor]]
    biases: dict[str, Tensor]
    adapted: frozenset[str]
    rows: dict[str, tuple[tuple[int, ...], Tensor]]
    problems: list[str]

    @classmethod
    def take_from_(
        cls, tensors: dict[str, Tensor], model: nn.Module, config: Mapping[str, object], adapted: Collection[str]
    ) -> StoredAuxiliary:
        """Moves the auxiliary parameters out of `tensors`; adapted: names of the layers that have A and B.

        Raises CheckpointError for a configuration that does not fit the model, whatever the file contains.
        """
        modules, problems = unwrapped_modules(model), list[str]()
        to_save = _modules_to_save(model, modules, config, problems)
        bias = config.get("bias", "none")
        if bias not in BIASES:
            problems.append(f"bias={bias!r} is not supported")
        holders = _bias_holders(modules, bias, to_save, adapted)
        tokens = _token_indices(model, config, problems)
        if problems:
            raise CheckpointError(f"the adapter's configuration does not fit this model: {'; '.join(problems)}")
        stored = cls({}, {}, frozenset(set(holders) & set(adapted)), {}, problems)
        for key in [key for key in tensors if key.startswith(PREFIX)]:
            name, _, part = key.removeprefix(PREFIX).rpartition(".")
            layer = key.removeprefix(PREFIX).removesuffix(ROWS)
            if key.endswith(ROWS) and layer in tokens:
                stored.rows[layer] = (tokens[layer], tensors.pop(key))
            elif name in to_save and part in parameter_names(modules[name]):
                stored.modules.setdefault(name, {})[part] = tensors.pop(key)
            elif part == "bias" and name.removesuffix(".base_layer") in holders:
                stored.biases[name.removesuffix(".base_layer")] = tensors.pop(key)
            elif bias == "all" and key.endswith(DUPLICATE_BIASES):
                del tensors[key]
        if both := sorted((stored.modules.keys() | stored.rows.keys()) & set(adapted)):
            problems.append(f"the file has both A and B and trained values for {listing(both, 4)}")
        wanted = [(name, part) for name in to_save for part in parameter_names(modules[name])]
        missing = [f"{name}.{part}" for name, part in wanted if part not in stored.modules.get(name, {})]
        missing += [f"{name}.bias" for name in holders if name not in stored.biases]
        missing += [f"the token rows of {name}" for name in tokens if name not in stored.rows]
        if missing:
            problems.append(
                f"the file lacks {len(missing)} tensors that modules_to_save, bias or trainable_token_indices name: "
                f"{listing(missing, 4)}"
            )
        problems += stored._value_problems(modules)
        if config.get("ensure_weight_tying"):
            problems += stored._tying_problems(model)
        return stored

    def _value_problems(self, modules: Mapping[str, nn.Module]) -> list[str]:
        """Returns a sentence for each tensor that the model cannot take."""
        problems = []
        expected = [
            (f"{name}.{part}", values, checkpoint_shape(modules[name], part))
            for name, parts in self.modules.items()
            for part, values in parts.items()
        ]
        expected += [(f"{name}.bias", v, checkpoint_shape(modules[name], "bias")) for name, v in self.biases.items()]
        for name, (indices, values) in self.rows.items():
            rows, width = checkpoint_shape(modules[name], "weight") or (0, 0)
            expected.append((f"the token rows of {name}", values, (len(indices), width)))
            if outside := [index for index in indices if not 0 <= index < rows]:
                problems.append(f"{name} has {rows} rows, and trainable_token_indices names {listing(outside, 4)}")
        for name, values, shape in expected:
            if tuple(values.shape) != shape:
                problems.append(f"{name} is {tuple(values.shape)}, the model needs {shape}")
            elif not values.is_floating_point():
                problems.append(f"{name} is of {values.dtype}, which is not a float dtype")
            elif not values.isfinite().all():
                problems.append(f"{name} holds NaN or infinity")
        return problems

    def _tying_problems(self, model: nn.Module) -> list[str]:
        """Returns a sentence for each tied pair with different values.

        peft's ensure_weight_tying trains tied modules as one; this package trains two copies with the same values.
        """
        problems = []
        for pair in architecture.tied_pairs(model):
            one, other = (self.modules.get(weight.removesuffix(".weight"), {}).get("weight") for weight in pair)
            if one is None and other is None:
                continue
            if one is None or other is None or not torch.equal(one, other):
                problems.append(f"ensure_weight_tying is set, and {' and '.join(pair)} are not the same")
        return problems

    def differences(self, model: nn.Module) -> list[str]:
        """Returns how these parameters differ from those that an adapted model trains already."""
        in_model = {name: set(copy.trained) for name, copy in trained_copies(model).items()}
        in_file = {name: set(parts) for name, parts in self.modules.items()}
        in_file |= {name: {"bias"} for name in self.biases if name not in self.adapted}
        tokens = {name: layer.rows.indices for name, layer in _layers_with_rows(model).items()}
        same = (
            in_model == in_file
            and set(_layers_with_bias(model)) == self.adapted
            and tokens == {name: indices for name, (indices, _) in self.rows.items()}
        )
        return [] if same else ["the model trains other modules_to_save, biases or token rows than the file has"]

    def _wrapper(self, model: nn.Module) -> Callable[[str, nn.Module], nn.Module | None]:
        """Returns the `make` of `replace_modules_` that wraps the trained modules, with the values of the file."""
        rows = {name: TokenRows(indices, values) for name, (indices, values) in self.rows.items()}
        tied = tied_embedding_names(model) if rows else []
        if tied and tied[0] in rows:
            rows = dict.fromkeys(tied, rows[tied[0]]) | rows

        def make(name: str, module: nn.Module) -> nn.Module | None:
            device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)
            if device is not None and device.type == "meta":
                device = None  # the values of a model on meta stay where they are
            if name in rows:
                return TrainableTokensLayer(module, rows[name].to(device))
            parts = self.modules.get(name)
            if parts is None and name in self.biases and name not in self.adapted:
                parts = {"bias": self.biases[name]}
            if parts is None:
                return None
            return TrainedCopy(module, {part: values.to(device) for part, values in parts.items()})

        return make

    @torch.no_grad()
    def put_into_(self, model: nn.Module, present: bool) -> None:
        """Gives the model these values; present: writes them into the auxiliary parameters that it has already."""
        if present:
            for name, copy in trained_copies(model).items():
                for part, values in (self.modules.get(name) or {"bias": self.biases[name]}).items():
                    copy.trained[part] = _with_values(copy.trained[part], values)
            for name, with_rows in _layers_with_rows(model).items():
                with_rows.rows.values = _with_values(with_rows.rows.values, self.rows[name][1])
        else:
            replace_modules_(model, self._wrapper(model))
        for name in self.adapted:
            layer = model.get_submodule(name)
            assert isinstance(layer, LoraLayer)
            if layer.trained_bias is None:
                layer.train_bias(self.biases[name].to(layer.lora_A.device))
            else:
                layer.trained_bias = _with_values(layer.trained_bias, self.biases[name])


def _with_values(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    """Copies values into the parameter and returns it; a parameter on meta is replaced instead."""
    if parameter.is_meta:
        return nn.Parameter(values)
    parameter.copy_(values)
    return parameter


def _modules_to_save(
    model: nn.Module, modules: Mapping[str, nn.Module], config: Mapping[str, object], problems: list[str]
) -> dict[str, nn.Module]:
    """Returns the modules that modules_to_save selects; names that match no module are ignored, as in peft."""
    wanted = config.get("modules_to_save") or []
    if not isinstance(wanted, list) or not all(isinstance(name, str) and name for name in wanted):
        problems.append(f"modules_to_save must be a list of names; got {wanted!r}")
        return {}
    try:
        found = modules_with_parameters(
            modules, [name for name in modules if name and any(_selects(want, name) for want in wanted)]
        )
        if config.get("ensure_weight_tying"):  # peft then names the embedding alone, and trains tied modules as well
            pairs = [[weight.removesuffix(".weight") for weight in pair] for pair in architecture.tied_pairs(model)]
            found |= modules_with_parameters(modules, [alias for alias, source in pairs if source in found])
    except TargetError as error:
        problems.append(str(error))
        return {}
    return found


def _bias_holders(
    modules: Mapping[str, nn.Module], bias: object, to_save: Collection[str], adapted: Collection[str]
) -> list[str]:
    """Returns the names of the modules whose bias the option `bias` trains."""
    if bias not in ("all", "lora_only"):
        return []
    holders = [name for name in modules_with_bias(modules) if name not in to_save]
    return holders if bias == "all" else [name for name in holders if name in adapted]


def _token_indices(model: nn.Module, config: Mapping[str, object], problems: list[str]) -> dict[str, tuple[int, ...]]:
    """Returns {layer: tokens} of trainable_token_indices, without a head that shares the embedding's rows."""
    given = config.get("trainable_token_indices")
    if not given:
        return {}
    try:
        layers = tied_embedding_names(model)
    except TargetError as error:
        problems.append(str(error))
        return {}
    by_name = given if isinstance(given, dict) else {layers[0]: given}
    found: dict[str, tuple[int, ...]] = {}
    for want, indices in by_name.items():
        names = [name for name in unwrapped_modules(model) if name and _selects(want, name)]
        if not names or not isinstance(indices, list) or len(set(indices)) != len(indices):
            problems.append(
                f"trainable_token_indices has {want!r}: {indices!r}, which is not a layer of this model or not a list "
                f"of distinct tokens"
            )
            continue
        found |= {name: tuple(indices) for name in names}
    return {n: tokens for n, tokens in found.items() if n not in layers[1:] or tokens != found.get(layers[0])}


def stored_replacements_(model: nn.Module, stored: Mapping[str, LazyTensor]) -> dict[str, Callable[[], Replacement]]:
    """Returns the replacement of each weight that an auxiliary parameter trains, by the weight's name.

    Replacements are read from the files, some rows at a time. The model's own values are dropped (moved to meta).
    """

    def rows_of(source: LazyTensor) -> Rows:
        return lambda start, stop: source.rows(start, stop)

    found: dict[str, Callable[[], Replacement]] = {}
    for key, weight, _ in list(auxiliary_tensors(model)):
        source = stored[key]
        found[weight] = functools.partial(Replacement, rows_of(source), source)
    for name, layer in trainable_tokens_layers(model).items():
        owner = next(n for n, other in _layers_with_rows(model).items() if other.rows is layer.rows)
        source = stored[f"{PREFIX}{owner}{ROWS}"]
        found[f"{name}.weight"] = functools.partial(Replacement, rows_of(source), source, layer.rows.indices)
    for copy in (*trained_copies(model).values(), *trainable_tokens_layers(model).values()):
        copy.to("meta")
    return found
