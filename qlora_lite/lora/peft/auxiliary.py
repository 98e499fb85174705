"""What is trained beside A and B in peft's files: modules_to_save, biases, rows of tokens.

peft's keys: `base_model.model.<module>.<parameter>` for a module that is trained whole; `….<layer>.base_layer.bias` and
`….<module>.bias` for biases; `….<embedding>.token_adapter.trainable_tokens_delta` for rows, which are values and no
differences, in the order of the configuration's trainable_token_indices.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.checkpoints.lazy_tensors import LazyTensor
from qlora_lite.compute.weight_update import Replaced, Rows
from qlora_lite.errors import CheckpointError, ConfigError, TargetError, listing
from qlora_lite.lora.auxiliary import biased, plain_modules, token_layers, trained_copies, units, with_token_rows
from qlora_lite.lora.auxiliary_layers import TokenRows, TrainedCopy, WithTokenRows, parameter_names, plain_shape
from qlora_lite.lora.config import BIASES
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.lora.peft.keys import PREFIX
from qlora_lite.surgery import replace_modules_

ROWS = ".token_adapter.trainable_tokens_delta"
BIAS = ".bias"
ADAPTED_BIAS = ".base_layer.bias"
# Written for bias="all" beside the trained values of a module that is whole: the base's own, and the same once more.
SPARE = (".original_module.bias", ".modules_to_save.bias")


def _means(name: str, wanted: str) -> bool:
    """peft's reading of a name in modules_to_save: the end of a module's name, at a dot or not."""
    return name.endswith(wanted)


def _is_bias_only(copy: TrainedCopy) -> bool:
    return list(copy.trained) == ["bias"] != parameter_names(copy.base_layer)


def _layers_with_bias(model: nn.Module) -> dict[str, LoraLayer]:
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    return {name: layer for name, layer in layers.items() if layer.trained_bias is not None}


def beside_keys(model: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """(peft's key, name of the weight in the plain checkpoint, values) of what is trained beside A and B."""
    for name, copy in trained_copies(model).items():
        for part, values in copy.trained.items():
            yield f"{PREFIX}{name}.{part}", f"{name}.{part}", values
    for name, layer in _layers_with_bias(model).items():
        assert layer.trained_bias is not None
        yield f"{PREFIX}{name}{ADAPTED_BIAS}", f"{name}{BIAS}", layer.trained_bias
    for name, with_rows in _owners(model).items():
        yield f"{PREFIX}{name}{ROWS}", f"{name}.weight", with_rows.rows.values


def _owners(model: nn.Module) -> dict[str, WithTokenRows]:
    """Of layers that share their rows, the input embedding, or else the first."""
    layers = with_token_rows(model)
    first = token_layers(model)[0] if layers else None
    owners: dict[int, str] = {}
    for name in sorted(layers, key=lambda name: name != first):
        owners.setdefault(id(layers[name].rows), name)
    return {name: layers[name] for name in owners.values()}


def beside_config(model: nn.Module) -> dict[str, Any]:
    """What peft's configuration says of it. ConfigError for names by which peft would mean other modules too."""
    copies = trained_copies(model)
    whole = sorted(name for name, copy in copies.items() if not _is_bias_only(copy))
    for name in whole:
        if others := [other for other in plain_modules(model) if other != name and _means(other, name)]:
            raise ConfigError(
                f"peft would take modules_to_save={name!r} for {listing(others, 4)} too, by the ends of their "
                f"names; train these as well, or put the model into a container"
            )
    biases = "all" if len(copies) > len(whole) else "lora_only" if _layers_with_bias(model) else "none"
    rows = {name: list(layer.rows.indices) for name, layer in _owners(model).items()}
    return {"bias": biases, "modules_to_save": whole or None, "trainable_token_indices": rows or None}


@dataclass(frozen=True)
class StoredBeside:
    """What the files hold beside A and B.

    whole: {module: {parameter: values}}; biases: {module: values}, adapted: those of them that have A and B too; rows:
    {layer: (tokens, values)}. problems: why the model cannot take them.
    """

    whole: dict[str, dict[str, Tensor]]
    biases: dict[str, Tensor]
    adapted: frozenset[str]
    rows: dict[str, tuple[tuple[int, ...], Tensor]]
    problems: list[str]

    @classmethod
    def taken(
        cls, model: nn.Module, tensors: dict[str, Tensor], config: Mapping[str, Any], adapted: Collection[str]
    ) -> StoredBeside:
        """Takes out of `tensors` what is not A and B; adapted: the layers that have those.

        CheckpointError for a configuration that says what this model cannot do, whatever the file holds.
        """
        modules, problems = plain_modules(model), list[str]()
        try:
            whole_units = _whole_units(model, modules, config)
        except TargetError as error:
            whole_units, problems = {}, [str(error)]
        bias = config.get("bias", "none")
        holders = [name for name in biased(modules) if name not in whole_units and bias in BIASES[1:]]
        if bias == "lora_only":
            holders = [name for name in holders if name in adapted]
        if bias not in BIASES:
            problems.append(f"bias={bias!r} is not known here")
        taken = cls({}, {}, frozenset(set(holders) & set(adapted)), {}, problems)
        asked_for = _asked_for(model, config, problems)
        if problems:
            raise CheckpointError(f"the adapter's configuration does not fit this model: {'; '.join(problems)}")
        for key in [key for key in tensors if key.startswith(PREFIX)]:
            name, _, part = key.removeprefix(PREFIX).rpartition(".")
            layer = key.removeprefix(PREFIX).removesuffix(ROWS)
            if key.endswith(ROWS) and layer in asked_for:
                taken.rows[layer] = (asked_for[layer], tensors.pop(key))
            elif name in whole_units and part in parameter_names(modules[name]):
                taken.whole.setdefault(name, {})[part] = tensors.pop(key)
            elif part == "bias" and name.removesuffix(".base_layer") in holders:
                taken.biases[name.removesuffix(".base_layer")] = tensors.pop(key)
            elif bias == "all" and key.endswith(SPARE):
                del tensors[key]
        if both := sorted((taken.whole.keys() | taken.rows.keys()) & set(adapted)):
            problems.append(f"{listing(both, 4)} has A and B and is trained itself")
        taken._check_complete(modules, whole_units, holders, asked_for)
        if config.get("ensure_weight_tying"):
            taken._check_tied(model)
        return taken

    def _check_complete(
        self,
        modules: Mapping[str, nn.Module],
        whole: Collection[str],
        holders: Collection[str],
        asked_for: Collection[str],
    ) -> None:
        lost = [f"{n}.{p}" for n in whole for p in parameter_names(modules[n]) if p not in self.whole.get(n, {})]
        lost += [f"{name}.bias" for name in holders if name not in self.biases]
        lost += [f"the rows of {name}" for name in asked_for if name not in self.rows]
        if lost:
            self.problems.append(f"the file has nothing for {len(lost)} of what is trained whole: {listing(lost, 4)}")
        shaped = [
            (f"{n}.{p}", v, plain_shape(modules[n], p)) for n, parts in self.whole.items() for p, v in parts.items()
        ]
        shaped += [(f"{name}.bias", v, plain_shape(modules[name], "bias")) for name, v in self.biases.items()]
        for name, (indices, values) in self.rows.items():
            rows, width = plain_shape(modules[name], "weight") or (0, 0)
            shaped.append((f"the rows of {name}", values, (len(indices), width)))
            if outside := [index for index in indices if not 0 <= index < rows]:
                self.problems.append(f"{name} has {rows} rows, and trainable_token_indices names {listing(outside, 4)}")
        for name, values, shape in shaped:
            if tuple(values.shape) != shape:
                self.problems.append(f"{name} is {tuple(values.shape)}, the model needs {shape}")
            elif not values.is_floating_point():
                self.problems.append(f"{name} is of {values.dtype}, which is no float")
            elif not values.isfinite().all():
                self.problems.append(f"{name} holds NaN or infinity")

    def _check_tied(self, model: nn.Module) -> None:
        """ensure_weight_tying has tied modules that are whole be one; here they are two of the same values."""
        for pair in architecture.tied_pairs(model):
            one, other = (self.whole.get(weight.removesuffix(".weight"), {}).get("weight") for weight in pair)
            if (one is None) != (other is None) or (one is not None and not torch.equal(one, other)):  # type: ignore[arg-type]
                self.problems.append(f"ensure_weight_tying is set, and {' and '.join(pair)} are not the same")

    def differences(self, model: nn.Module) -> list[str]:
        """How this differs from what a model trains that has adapters already."""
        here = {name: set(copy.trained) for name, copy in trained_copies(model).items()}
        file = {name: set(parts) for name, parts in self.whole.items()}
        file |= {name: {"bias"} for name in self.biases if name not in self.adapted}
        tokens = {name: layer.rows.indices for name, layer in _owners(model).items()}
        same = (
            here == file
            and set(_layers_with_bias(model)) == self.adapted
            and tokens == {name: indices for name, (indices, _) in self.rows.items()}
        )
        return (
            [] if same else ["the model trains other modules, biases or tokens beside its adapters than the file has"]
        )

    def wrapped(self, model: nn.Module) -> Callable[[str, nn.Module], nn.Module | None]:
        """What `replace_modules_` puts in the place of a module that is trained, with the file's values."""
        rows = {name: TokenRows(indices, values) for name, (indices, values) in self.rows.items()}
        tied = token_layers(model) if rows else []
        if tied and tied[0] in rows:
            rows = dict.fromkeys(tied, rows[tied[0]]) | rows

        def make(name: str, module: nn.Module) -> nn.Module | None:
            device = next((tensor.device for tensor in (*module.parameters(), *module.buffers())), None)
            if device is not None and device.type == "meta":
                device = None  # there the values stay where they are
            if name in rows:
                return WithTokenRows(module, rows[name].to(device))
            parts = self.whole.get(name)
            if parts is None and name in self.biases and name not in self.adapted:
                parts = {"bias": self.biases[name]}
            if parts is None:
                return None
            return TrainedCopy(module, {part: values.to(device) for part, values in parts.items()})

        return make

    @torch.no_grad()
    def put_(self, model: nn.Module, present: bool) -> None:
        """Gives the model what the file holds; present: into what it trains already."""
        if not present:
            replace_modules_(model, self.wrapped(model))
        for name, copy in trained_copies(model).items() if present else ():
            for part, values in (self.whole.get(name) or {"bias": self.biases[name]}).items():
                copy.trained[part] = _holding(copy.trained[part], values)
        for name, layer in _owners(model).items() if present else ():
            layer.rows.values = _holding(layer.rows.values, self.rows[name][1])
        for name in self.adapted:
            layer_: Any = model.get_submodule(name)
            if present:
                layer_.trained_bias = _holding(layer_.trained_bias, self.biases[name])
            else:
                layer_.train_bias(self.biases[name].to(layer_.lora_A.device))


def _holding(parameter: nn.Parameter, values: Tensor) -> nn.Parameter:
    """The parameter, with these values; on meta, where there is nothing to copy into, another one."""
    if parameter.is_meta:
        return nn.Parameter(values)
    parameter.copy_(values)
    return parameter


def _whole_units(model: nn.Module, modules: Mapping[str, nn.Module], config: Mapping[str, Any]) -> dict[str, nn.Module]:
    """What modules_to_save means in this model; names that it does not have mean nothing, as in peft."""
    wanted = config.get("modules_to_save") or []
    if not isinstance(wanted, list) or not all(isinstance(name, str) and name for name in wanted):
        raise TargetError(f"modules_to_save must be a list of names; got {wanted!r}")
    chosen = [name for name in modules if name and any(_means(name, want) for want in wanted)]
    found = units(modules, chosen)
    if config.get("ensure_weight_tying"):  # then peft names the embedding alone, and trains what is tied to it as well
        pairs = [[weight.removesuffix(".weight") for weight in pair] for pair in architecture.tied_pairs(model)]
        found |= units(modules, [alias for alias, source in pairs if source in found])
    return found


def _asked_for(model: nn.Module, config: Mapping[str, Any], problems: list[str]) -> dict[str, tuple[int, ...]]:
    """{layer: tokens} of trainable_token_indices; a head that is tied to the embedding and has the same is left out."""
    given = config.get("trainable_token_indices")
    if not given:
        return {}
    try:
        layers = token_layers(model)
    except TargetError as error:
        problems.append(str(error))
        return {}
    by_name = given if isinstance(given, dict) else {layers[0]: given}
    found: dict[str, tuple[int, ...]] = {}
    for want, indices in by_name.items():
        names = [name for name in plain_modules(model) if name and _means(name, want)]
        if not names or not isinstance(indices, list) or len(set(indices)) != len(indices):
            problems.append(f"trainable_token_indices has {want!r}: {indices!r}, no layer of this model or no tokens")
        found |= {name: tuple(indices) for name in names}
    return {n: tokens for n, tokens in found.items() if n not in layers[1:] or tokens != found.get(layers[0])}


def stored_replacements_(model: nn.Module, stored: Mapping[str, LazyTensor]) -> dict[str, Callable[[], Replaced]]:
    """What stands in the place of weights, read from the files some rows at a time, by the weights' names.

    The model lets go of its values.
    """

    def rows_of(source: LazyTensor) -> Rows:
        return lambda start, stop: source.rows(start, stop)

    found: dict[str, Callable[[], Replaced]] = {}
    for key, weight, _ in list(beside_keys(model)):
        source = stored[key]
        found[weight] = functools.partial(Replaced, rows_of(source), source)
    for name, layer in with_token_rows(model).items():
        owner = next(n for n, other in _owners(model).items() if other.rows is layer.rows)
        source = stored[f"{PREFIX}{owner}{ROWS}"]
        found[f"{name}.weight"] = functools.partial(Replaced, rows_of(source), source, layer.rows.indices)
    for copy in (*trained_copies(model).values(), *with_token_rows(model).values()):
        copy.to("meta")
    return found
