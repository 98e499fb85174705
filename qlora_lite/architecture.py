"""What is asked of transformers: a config, an empty model, a tokenizer, which module is the head.

The only file that imports transformers; it does so when it is first needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite.errors import CheckpointError


def fill_computed_buffers_(model: Any, device: torch.device) -> None:
    """Computes the buffers that no checkpoint holds (rotary frequencies, scales), which were left on meta.

    transformers computes them where it initializes a module's weights, or its parts'; it does not see what was loaded.
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
            raise CheckpointError(f"transformers does not say how to compute {', '.join(lost)} of {path}")


def tie(model: Any) -> None:
    """Lets tied weights be one parameter, as the config says."""
    model.tie_weights()


def tied_names(model: Any) -> set[str]:
    """Names of parameters that are aliases of others, and that a checkpoint leaves out."""
    return {alias for alias, _ in tied_pairs(model)}


def tied_pairs(model: Any) -> list[tuple[str, str]]:
    """(alias, name of the parameter it is) for each of `tied_names`."""
    return list((getattr(model, "all_tied_weights_keys", None) or {}).items())


def ignorable_keys(model: Any) -> list[str]:
    """Regular expressions of checkpoint entries that this architecture knows to be of no use."""
    return [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []), r"rotary_emb\.inv_freq$"]


def kept_unpacked(model: Any) -> list[str]:
    """Patterns of module names that transformers leaves unpacked in this architecture, whatever its config says."""
    return list(getattr(model, "_keep_in_fp32_modules", None) or [])


def longest_sequence(config: Any) -> int | None:
    """How many positions the model was made for, None where its config does not say."""
    return getattr(config, "max_position_embeddings", None)


def input_embedding(model: Any) -> nn.Module | None:
    """Returns the input embedding, or None for a model without `get_input_embeddings()`."""
    return _named_module(model, "get_input_embeddings")


def output_head(model: Any) -> nn.Module | None:
    """Returns the output head, or None for a model without `get_output_embeddings()`."""
    return _named_module(model, "get_output_embeddings")


def _named_module(model: Any, getter: str) -> nn.Module | None:
    get = getattr(model, getter, None)
    return get() if callable(get) else None


def vocabulary_size(model: Any) -> int | None:
    """Returns the number of rows of the input embedding, or None for a model without one."""
    return getattr(input_embedding(model), "num_embeddings", None)


def hidden_states(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """What the output head is applied to: the last hidden state `(batch, tokens, features)`."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model.base_model(**inputs, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


def logit_options(model: Any) -> dict[str, float]:
    """What the model does with its head's logits, as arguments of `linear_cross_entropy`."""
    config = model.config
    options: dict[str, float] = {}
    if getattr(config, "final_logit_softcapping", None):  # Gemma
        options["softcap"] = config.final_logit_softcapping
    if getattr(config, "logit_scale", None):  # Cohere multiplies
        options["logit_scale"] = config.logit_scale
    if getattr(config, "logits_scaling", None):  # Granite divides
        options["logit_scale"] = 1 / config.logits_scaling
    return options
