"""Several adapters on one base, by name: one is in use or none, the others are parked beside the model (adapters.py).

The adapter in use is the LoraLayers that are in the model; a layer that it does not adapt is its plain base. So
everything that knows one adapter knows each of several, and those that are not in use cost no time and no gradients.
Switching exchanges modules: no value is written, neither of a base nor of an adapter, and A and B stay the same
parameters, so that an optimizer over them goes on after a switch there and back.

`state_dict` is that of the model with the adapter in use and no other; `save_adapter(model, folder, name=...)` writes
any of them. An adapter that was added without a name is called `default`. While layers are merged or switched off
(`adapters_disabled`) nothing can be switched, added or deleted: ConfigError says so. Nor can an adapter be set aside
with which modules are trained whole, or rows of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite.checks import is_finite, require
from qlora_lite.errors import ConfigError, TargetError, listing
from qlora_lite.lora.adapters import (
    adapted,
    add_lora_,
    bare_,
    check_name,
    lora_layers,
    park_,
    parked,
    switched,
    unpark_,
)
from qlora_lite.lora.config import LoraConfig, check_rank
from qlora_lite.lora.kinds import kind_of
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.surgery import exchange_modules_, replace_modules_


def active_adapter(model: nn.Module) -> str | None:
    """The name of the adapter in use; None if the model is its base."""
    return next((layer.adapter_name for layer in lora_layers(model).values()), None)


def adapter_names(model: nn.Module) -> list[str]:
    """The names of all adapters, in use or not, by the alphabet."""
    active = active_adapter(model)
    return sorted({*parked(model), *([] if active is None else [active])})


def _check_known(model: nn.Module, name: str) -> None:
    if name not in (names := adapter_names(model)):
        raise TargetError(f"the model has no adapter {name!r}; it has: {', '.join(names) or 'none'}")


def _check_at_rest(layers: Mapping[str, LoraLayer]) -> None:
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise ConfigError(f"{len(merged)} layers are merged, {merged[0]} first; unmerge_lora_ before changing adapters")
    if off := [name for name, layer in layers.items() if not layer.adapter_enabled]:
        raise ConfigError(f"{len(off)} adapted layers are switched off (adapters_disabled), {off[0]} first; leave that")
    if "" in layers:
        raise TargetError("the model itself is the adapted layer, which cannot be exchanged; put it into a container")


def _check_parkable(model: nn.Module) -> None:
    whole = [name for name, module in switched(model).items() if not isinstance(module, LoraLayer)]
    if whole:
        raise ConfigError(
            f"{listing(whole, 4)}: modules that are trained whole and rows of tokens belong to the adapter in use "
            f"and cannot be set aside with it; save it, and remove_lora_ before another is added"
        )


def _fits(layer: LoraLayer, base: nn.Module | None) -> bool:
    kind = None if base is None else kind_of(base)
    alike = kind is not None and type(kind) is type(layer.kind)
    return alike and kind.features(base) == (layer.in_features, layer.out_features)  # type: ignore[union-attr]


def _bases(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """The base of each layer of a parked adapter. TargetError that lists the layers which do not fit it any more."""
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = parked(model)[name]
    found = {path: modules.get(path) for path in layers}
    bases: Any = {path: base.base_layer if isinstance(base, LoraLayer) else base for path, base in found.items()}
    if lost := [path for path, layer in layers.items() if not _fits(layer, bases[path])]:
        raise TargetError(f"adapter {name!r} fits the model no more; replaced were: {listing(lost)}")
    return bases  # type: ignore[no-any-return]


@contextmanager
def adapter_layers(model: nn.Module, name: str | None = None) -> Iterator[dict[str, LoraLayer]]:
    """Within the block, the layers of an adapter by name, to look at, in use or not; None: of the one in use."""
    if name is None or name == active_adapter(model):
        yield lora_layers(model)
        return
    _check_known(model, name)
    bases, layers = _bases(model, name), parked(model)[name]
    for path, layer in layers.items():
        layer.base_layer = bases[path]
    try:
        yield layers
    finally:
        for layer in layers.values():
            del layer.base_layer


def use_adapter_(model: nn.Module, name: str | None) -> None:
    """Has the model compute with the adapter of this name and no other; None: with none, as its base.

    All or nothing: TargetError for a name that is not there or an adapter whose layers were replaced, ConfigError while
    layers are merged or switched off, before anything is changed. The gradients of the adapter that is parked are let
    go; its values, and whether its parameters are to be trained, stay.
    """
    before, leaving = active_adapter(model), lora_layers(model)
    if name is not None:
        _check_known(model, name)
    if name == before:
        return
    _check_at_rest(leaving)
    _check_parkable(model)
    bases = {} if name is None else _bases(model, name)
    entering = {} if name is None else parked(model)[name]
    new: dict[int, nn.Module] = {id(layer): layer.base_layer for layer in leaving.values()}
    for path, layer in entering.items():
        layer.base_layer, layer.training = bases[path], bases[path].training
        new[id(leaving.get(path, bases[path]))] = layer
    exchange_modules_(model, new)
    if name is not None:
        unpark_(model, name)
    for layer in leaving.values():
        del layer.base_layer
        layer.zero_grad(set_to_none=True)
    if before is not None:
        park_(model, before, leaving)


@contextmanager
def using_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """`use_adapter_` for the block; afterwards the adapter is in use that was before."""
    before = active_adapter(model)
    use_adapter_(model, name)
    try:
        yield
    finally:
        use_adapter_(model, before)


@contextmanager
def room_for(model: nn.Module, name: str) -> Iterator[None]:
    """The block puts the adapter of this new name onto the plain base; if it fails, all is as it was before."""
    check_name(model, name)
    before = active_adapter(model)
    if name == before:
        raise TargetError(
            f"the adapter in use is named {name!r} already; name the new one otherwise, or delete_adapter_"
        )
    use_adapter_(model, None)
    try:
        yield
    except BaseException:
        bare_(model)
        use_adapter_(model, before)
        raise


def add_adapter_(model: nn.Module, name: str, config: LoraConfig) -> list[str]:
    """`add_lora_` for a further adapter, which is then the one in use; the others keep their layers and values.

    Raises what `add_lora_` and `use_adapter_` raise, TargetError for a name that is taken, ConfigError for one that is
    not of letters, digits, _ and -. The model is then as it was.
    """
    with room_for(model, name):
        return add_lora_(model, config, name)


def delete_adapter_(model: nn.Module, name: str) -> None:
    """Drops an adapter; if it was in use, the model then computes what its base does. Errors: as of `use_adapter_`."""
    _check_known(model, name)
    if name == active_adapter(model):
        use_adapter_(model, None)
    unpark_(model, name)


def _summed(terms: list[tuple[float, LoraLayer]], rank: int | None) -> tuple[Tensor, Tensor]:
    """(A, B) in fp32 with B A = sum of weight * scaling * B_i A_i; of a smaller rank, the nearest such B A."""
    pairs = [(weight * layer.scaling, *layer.factors) for weight, layer in terms]
    lora_A = torch.cat([A.detach().float() for _, A, _ in pairs])
    lora_B = torch.cat([B.detach().float() * factor for factor, _, B in pairs], dim=1)
    if rank is None or rank >= lora_A.shape[0]:
        return lora_A, lora_B
    # B A = Q_B (R_B R_A^T) Q_A^T: its singular values are those of a matrix of the ranks' size.
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(lora_B), torch.linalg.qr(lora_A.T)
    left, values, right = torch.linalg.svd(R_B @ R_A.T)
    root = values[:rank].sqrt()
    return root[:, None] * (right[:rank] @ Q_A.T), (Q_B @ left[:, :rank]) * root


@torch.no_grad()
def combine_adapters_(model: nn.Module, weights: Mapping[str, float], name: str, rank: int | None = None) -> list[str]:
    """Makes a new adapter of the weighted sum of others, uses it, and returns the names of its layers.

    Each layer's update is sum_i weight_i * scaling_i * B_i A_i over the adapters that it has: exactly, as an ordinary
    adapter whose rank is the sum of theirs, alpha equal to it, in fp32 and without dropout (peft's
    `add_weighted_adapter` with `cat`). rank: layers of a larger one get the nearest update of this rank, by singular
    values (peft's `svd`). peft's `linear`, which sums A and B and not the updates, is not offered.

    Raises TargetError for names that are not there, ConfigError for a variant with more parameters than A and B, or a
    weight that is not a finite number, and what `add_adapter_` raises. The adapters that are combined stay.
    """
    given = isinstance(weights, Mapping) and bool(weights) and all(map(is_finite, weights.values()))
    require(given, "combine_adapters_ takes {name of an adapter: a finite weight}", weights)
    if rank is not None:
        check_rank("rank", rank)
    for known in weights:
        _check_known(model, known)
    terms: dict[str, list[tuple[float, LoraLayer]]] = {}
    with ExitStack() as looked_at:
        for known, weight in weights.items():
            for path, layer in looked_at.enter_context(adapter_layers(model, known)).items():
                variant = layer.variant
                if variant.parameters or layer.trained_bias is not None:
                    what = f"is of variant {variant.name}" if variant.parameters else "has trained biases"
                    raise ConfigError(f"adapter {known!r} {what}, which cannot be summed")
                terms.setdefault(path, []).append((weight, layer))
        factors = {path: _summed(its, rank) for path, its in terms.items()}

    def make(path: str, base: nn.Module) -> nn.Module | None:
        if path not in factors:
            return None
        lora_A, lora_B = factors[path]
        made: Any = adapted(path, base, LoraConfig(len(lora_A), len(lora_A)), torch.float32)
        made.lora_A.copy_(lora_A)
        made.lora_B.copy_(lora_B)
        made.adapter_name = name
        return made  # type: ignore[no-any-return]

    with room_for(model, name):
        return replace_modules_(model, make)


def _adapted(model: nn.Module) -> dict[str, LoraLayer]:
    layers = lora_layers(model)
    if not layers:
        raise TargetError("the model has no adapters, or none in use; add_lora_ or load_adapter_ puts them in")
    return layers


def merge_lora_(model: nn.Module, dtype: torch.dtype | None = None, *, name: str | None = None) -> None:
    """Makes every adapted layer use its merged weight, unpacked, summed in fp32 and cast (see LoraLayer).

    Costs one dense weight per adapted layer until `unmerge_lora_`. On QuantizationError (fp16 overflow, NaN) or
    ConfigError (a layer that must not be merged) no layer is merged that was not before.
    name: of several adapters, uses this one first (named_adapters.use_adapter_); None: the one in use.
    """
    before = active_adapter(model)
    if name is not None:
        use_adapter_(model, name)
    done: list[LoraLayer] = []
    try:
        for path, layer in _adapted(model).items():
            fresh = not layer.merged
            layer.merge_weights(dtype, f"{path}.weight")
            if fresh:
                done.append(layer)
    except Exception:
        for layer in done:
            layer.unmerge_weights()
        use_adapter_(model, before)
        raise


def unmerge_lora_(model: nn.Module) -> None:
    """Makes every adapted layer use W0 and its low-rank term apart again; W0 is what it was, bit for bit."""
    for layer in _adapted(model).values():
        layer.unmerge_weights()
