"""Several adapters on one base, by name. At most one is in use; the others are stored on the model (adapters.py).

The adapter in use is the LoraLayers in the model; a layer that it does not adapt is the plain base layer. So all code
that works with one adapter works with several, and inactive adapters cost neither time nor gradients. Switching
exchanges modules: no value of a base or an adapter is written, and A and B stay the same parameters, so an optimizer
that holds them remains valid after switching away and back.

`state_dict` contains the adapter in use and no other; `save_adapter(model, folder, name=...)` writes any of them. An
adapter that was added without a name is called `default`. While layers are merged or switched off
(`adapters_disabled`), switching, adding and deleting raise ConfigError. So does switching away from an adapter with
modules_to_save, bias="all" or trainable_token_indices, whose trained copies cannot be stored.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from qlora_lite.checks import is_finite, require
from qlora_lite.errors import ConfigError, TargetError, listing
from qlora_lite.lora.adapters import (
    add_lora_,
    check_adapter_name,
    drop_inactive_,
    inactive_adapters,
    keep_inactive_,
    lora_layers,
    unwrap_layers_,
    wrap_layer,
    wrapped_layers,
)
from qlora_lite.lora.config import LoraConfig, check_rank
from qlora_lite.lora.kinds import kind_of
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.lora.targets import TargetedLayer
from qlora_lite.sharding.base import check_whole
from qlora_lite.surgery import exchange_modules_, replace_modules_


def active_adapter(model: nn.Module) -> str | None:
    """Returns the name of the adapter in use, or None if there is none."""
    return next((layer.adapter_name for layer in lora_layers(model).values()), None)


def adapter_names(model: nn.Module) -> list[str]:
    """Returns the names of all adapters, in use or not, in alphabetical order."""
    active = active_adapter(model)
    return sorted({*inactive_adapters(model), *([] if active is None else [active])})


def _check_exists(model: nn.Module, name: str) -> None:
    if name not in (names := adapter_names(model)):
        raise TargetError(f"the model has no adapter {name!r}; it has: {', '.join(names) or 'none'}")


def _check_can_change(model: nn.Module) -> None:
    """Raises ConfigError or TargetError if the adapter in use cannot be switched away from now."""
    layers = lora_layers(model)
    if merged := [name for name, layer in layers.items() if layer.merged]:
        raise ConfigError(
            f"{len(merged)} layers are merged, {merged[0]} first; call unmerge_lora_ before changing adapters"
        )
    if disabled := [name for name, layer in layers.items() if not layer.adapter_enabled]:
        raise ConfigError(
            f"{len(disabled)} adapted layers are switched off, {disabled[0]} first; leave adapters_disabled before "
            f"changing adapters"
        )
    if "" in layers:
        raise TargetError("the model itself is the adapted layer, which cannot be exchanged; put it into a container")
    auxiliary = [name for name, module in wrapped_layers(model).items() if not isinstance(module, LoraLayer)]
    if auxiliary:
        raise ConfigError(
            f"{listing(auxiliary, 4)}: an adapter with modules_to_save, bias='all' or trainable_token_indices cannot "
            f"be switched away from; save it, and call remove_lora_ before another is added"
        )


def _fits(layer: LoraLayer, base: nn.Module | None) -> bool:
    """Whether an inactive adapter's layer can be put around this base."""
    kind = None if base is None else kind_of(base)
    if base is None or kind is None or type(kind) is not type(layer.kind):
        return False
    return kind.features(base) == (layer.in_features, layer.out_features)


def _base_layers(model: nn.Module, name: str) -> dict[str, nn.Module]:
    """Returns the base of each layer of an inactive adapter. Raises TargetError that lists replaced layers."""
    modules = dict(model.named_modules(remove_duplicate=False))
    bases, replaced = {}, []
    for path, layer in inactive_adapters(model)[name].items():
        module = modules.get(path)
        base = module.base_layer if isinstance(module, LoraLayer) else module
        if base is None or not _fits(layer, base):
            replaced.append(path)
        else:
            bases[path] = base
    if replaced:
        raise TargetError(f"adapter {name!r} no longer fits the model, in which were replaced: {listing(replaced)}")
    return bases


@contextmanager
def adapter_layers(model: nn.Module, name: str | None = None) -> Iterator[dict[str, LoraLayer]]:
    """Yields the layers of an adapter by name, for reading, whether it is in use or not; None means the one in use."""
    if name is None or name == active_adapter(model):
        yield lora_layers(model)
        return
    _check_exists(model, name)
    bases, layers = _base_layers(model, name), inactive_adapters(model)[name]
    for path, layer in layers.items():
        layer.base_layer = bases[path]
    try:
        yield layers
    finally:
        for layer in layers.values():
            del layer.base_layer


def use_adapter_(model: nn.Module, name: str | None) -> None:
    """Makes the model compute with the adapter of this name and no other; None means the plain base.

    Gradients of the adapter that was in use are set to None; its values and its requires_grad stay. Raises TargetError
    for an unknown name or an adapter whose layers were replaced, ConfigError while layers are merged or switched off.
    The model is then unchanged.
    """
    before, leaving = active_adapter(model), lora_layers(model)
    if name is not None:
        _check_exists(model, name)
    if name == before:
        return
    _check_can_change(model)
    bases = {} if name is None else _base_layers(model, name)
    entering = {} if name is None else inactive_adapters(model)[name]
    new: dict[int, nn.Module] = {id(layer): layer.base_layer for layer in leaving.values()}
    for path, layer in entering.items():
        layer.base_layer, layer.training = bases[path], bases[path].training
        new[id(leaving.get(path, bases[path]))] = layer
    exchange_modules_(model, new)
    if name is not None:
        drop_inactive_(model, name)
    for layer in leaving.values():
        del layer.base_layer
        layer.zero_grad(set_to_none=True)
    if before is not None:
        keep_inactive_(model, before, leaving)


@contextmanager
def using_adapter(model: nn.Module, name: str | None) -> Iterator[None]:
    """Uses this adapter within the block (`use_adapter_`), and afterwards the one that was in use before."""
    before = active_adapter(model)
    use_adapter_(model, name)
    try:
        yield
    finally:
        use_adapter_(model, before)


@contextmanager
def adding_adapter(model: nn.Module, name: str) -> Iterator[None]:
    """Gives the block the plain base to put a new adapter of this name onto; restores the model if the block raises."""
    check_adapter_name(model, name)
    before = active_adapter(model)
    if name == before:
        raise TargetError(
            f"the adapter in use is named {name!r} already; choose another name, or remove it with delete_adapter_"
        )
    use_adapter_(model, None)
    try:
        yield
    except BaseException:
        unwrap_layers_(model)
        use_adapter_(model, before)
        raise


def add_adapter_(model: nn.Module, name: str, config: LoraConfig) -> list[str]:
    """Adds a further adapter and uses it; returns the names of its layers. The other adapters keep their values.

    Raises what `add_lora_` and `use_adapter_` raise, TargetError for a name that is taken, and ConfigError for one with
    other characters than letters, digits, _ and -. The model is then unchanged.
    """
    with adding_adapter(model, name):
        return add_lora_(model, config, name)


def delete_adapter_(model: nn.Module, name: str) -> None:
    """Removes an adapter; if it was in use, the model then computes what its base does. Raises as `use_adapter_`."""
    _check_exists(model, name)
    if name == active_adapter(model):
        use_adapter_(model, None)
    drop_inactive_(model, name)


def _weighted_sum(terms: list[tuple[float, LoraLayer]], rank: int | None) -> tuple[Tensor, Tensor]:
    """Returns (A, B) in fp32 with B A = sum of weight_i * scaling_i * B_i A_i, or the nearest B A of a smaller rank."""
    weighted = [(weight * layer.scaling, *layer.factors) for weight, layer in terms]
    lora_A = torch.cat([A.detach().float() for _, A, _ in weighted])
    lora_B = torch.cat([B.detach().float() * factor for factor, _, B in weighted], dim=1)
    if rank is None or rank >= lora_A.shape[0]:
        return lora_A, lora_B
    # B A = Q_B (R_B R_A^T) Q_A^T: the matrix in the middle has its singular values and is only of the ranks' size.
    (Q_B, R_B), (Q_A, R_A) = torch.linalg.qr(lora_B), torch.linalg.qr(lora_A.T)
    left, values, right = torch.linalg.svd(R_B @ R_A.T)
    root = values[:rank].sqrt()
    return root[:, None] * (right[:rank] @ Q_A.T), (Q_B @ left[:, :rank]) * root


@torch.no_grad()
def combine_adapters_(model: nn.Module, weights: Mapping[str, float], name: str, rank: int | None = None) -> list[str]:
    """Adds a new adapter that is the weighted sum of others, uses it, and returns the names of its layers.

    The update of each layer is sum_i weight_i * scaling_i * B_i A_i over the adapters that adapt it. It is exact: an
    ordinary adapter whose rank is the sum of the ranks, alpha equal to the rank, in fp32 and without dropout (peft's
    `add_weighted_adapter` with `cat`). The combined adapters stay.

    rank: layers of a larger rank get the nearest update of this rank, by singular values (peft's `svd`). peft's
    `linear`, which sums A and B instead of the updates, is not offered.

    Raises TargetError for unknown names, ConfigError for trained biases, a variant with more parameters than A and B,
    or a weight that is not finite, and what `add_adapter_` raises.
    """
    given = isinstance(weights, Mapping) and bool(weights) and all(map(is_finite, weights.values()))
    require(given, "combine_adapters_ takes {name of an adapter: a finite weight}", weights)
    if rank is not None:
        check_rank("rank", rank)
    for source in weights:
        _check_exists(model, source)
    terms: dict[str, list[tuple[float, LoraLayer]]] = {}
    with ExitStack() as adapters:
        for source, weight in weights.items():
            for path, layer in adapters.enter_context(adapter_layers(model, source)).items():
                variant = layer.variant
                if variant.parameters or layer.trained_bias is not None:
                    what = f"is of variant {variant.name}" if variant.parameters else "has trained biases"
                    raise ConfigError(f"adapter {source!r} {what}, which cannot be summed")
                terms.setdefault(path, []).append((weight, layer))
        factors = {path: _weighted_sum(layers, rank) for path, layers in terms.items()}

    def make(path: str, base: nn.Module) -> nn.Module | None:
        if path not in factors:
            return None
        lora_A, lora_B = factors[path]
        config = LoraConfig(len(lora_A), len(lora_A))
        target = TargetedLayer.of(path, base, config)
        assert target is not None  # it has an adapter
        layer = wrap_layer(target, config, torch.float32)
        layer.lora_A.copy_(lora_A)
        layer.lora_B.copy_(lora_B)
        layer.adapter_name = name
        return layer

    with adding_adapter(model, name):
        return replace_modules_(model, make)


def _layers_in_use(model: nn.Module) -> dict[str, LoraLayer]:
    layers = lora_layers(model)
    if not layers:
        raise TargetError("the model has no adapters, or none in use; add_lora_ or load_adapter_ puts them in")
    return layers


def merge_lora_(model: nn.Module, dtype: torch.dtype | None = None, *, name: str | None = None) -> None:
    """Makes every adapted layer compute with its merged weight: unpacked, summed in fp32, then cast (see LoraLayer).

    Takes the memory of one dense weight for each adapted layer until `unmerge_lora_`.

    name: the adapter to use first (`use_adapter_`); None: the one in use.

    Raises QuantizationError for fp16 overflow or NaN, and ConfigError for a layer that must not be merged. The layers
    that were merged by this call are then unmerged again.
    """
    check_whole(model, "merge_lora_")
    before = active_adapter(model)
    if name is not None:
        use_adapter_(model, name)
    done: list[LoraLayer] = []
    try:
        for path, layer in _layers_in_use(model).items():
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
    """Makes every adapted layer compute with W0 and A, B apart again. W0 was never changed."""
    for layer in _layers_in_use(model).values():
        layer.unmerge_weights()
