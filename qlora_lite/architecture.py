"""Facts about transformers models: head, embedding, tied weights, sizes, what they do with logits.

The only file that reads their attributes for this; a model of another origin answers None or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite.errors import CheckpointError


def fill_computed_buffers_(model: Any, device: torch.device) -> None:
    """Computes the buffers that no checkpoint holds (rotary frequencies, scales) and that were left on meta.

    transformers computes them in `_init_weights` of a module, together with the weights of the module and its
    children. Everything already loaded is therefore hidden on meta while it runs. Raises CheckpointError for a buffer
    that is not computed there.
    """
    for path, module in model.named_modules():
        names = [name for name, buffer in module.named_buffers(recurse=False) if buffer.is_meta]
        if not names:
            continue
        loaded = [(store, dict(store)) for part in module.modules() for store in (part._parameters, part._buffers)]
        for store, tensors in loaded:
            for name, tensor in tensors.items():
                if tensor is not None:
                    store[name] = tensor.to("meta")
        for name in names:
            empty = torch.empty_like(module._buffers[name], device="cpu")
            module._buffers[name] = empty.fill_(torch.nan) if empty.is_floating_point() else empty
        model._init_weights(module)
        computed = {name: module._buffers[name].to(device) for name in names}
        for store, tensors in loaded:
            store.update(tensors)
        module._buffers.update(computed)
        if lost := [name for name, made in computed.items() if made.is_floating_point() and not (made == made).all()]:
            raise CheckpointError(f"transformers does not compute {', '.join(lost)} of {path}, which no file holds")


def tie(model: Any) -> None:
    """Makes tied weights one parameter, as the model's config says."""
    model.tie_weights()


def tied_names(model: nn.Module) -> set[str]:
    """Returns the names of parameters that are aliases of others; a checkpoint leaves them out."""
    return {alias for alias, _ in tied_pairs(model)}


def tied_pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Returns (alias, name of the parameter that it is) for each of `tied_names`."""
    pairs: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    return list(pairs.items())


def ignorable_keys(model: nn.Module) -> list[str]:
    """Returns regular expressions of checkpoint entries that this architecture does not use."""
    return [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []), r"rotary_emb\.inv_freq$"]


def kept_unpacked(model: nn.Module) -> list[str]:
    """Returns patterns of module names that transformers never packs in this architecture."""
    return list(getattr(model, "_keep_in_fp32_modules", None) or [])


def longest_sequence(config: object) -> int | None:
    """Returns the number of positions that a model was made for, None if its config does not give it."""
    return getattr(config, "max_position_embeddings", None)


def input_embedding(model: nn.Module) -> nn.Module | None:
    """Returns the input embedding, or None for a model without `get_input_embeddings()`."""
    return _named_module(model, "get_input_embeddings")


def output_head(model: nn.Module) -> nn.Module | None:
    """Returns the output head, or None for a model without `get_output_embeddings()`."""
    return _named_module(model, "get_output_embeddings")


def _named_module(model: nn.Module, getter: str) -> nn.Module | None:
    get: Callable[[], nn.Module | None] | None = getattr(model, getter, None)
    return get() if callable(get) else None


def vocabulary_size(model: nn.Module) -> int | None:
    """Returns the number of rows of the input embedding, or None for a model without one."""
    return getattr(input_embedding(model), "num_embeddings", None)


def hidden_states(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Returns the last hidden state `(batch, tokens, features)`, the input of the output head."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model.base_model(**inputs, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


def logit_options(model: Any) -> dict[str, float]:
    """Returns what the model does with the logits of its head, as arguments of `linear_cross_entropy`."""
    config = model.config
    options: dict[str, float] = {}
    if getattr(config, "final_logit_softcapping", None):  # Gemma
        options["softcap"] = config.final_logit_softcapping
    if getattr(config, "logit_scale", None):  # Cohere multiplies
        options["logit_scale"] = config.logit_scale
    if getattr(config, "logits_scaling", None):  # Granite divides
        options["logit_scale"] = 1 / config.logits_scaling
    return options
