"""Facts about transformers models: head, embedding, tied weights, sizes, what they do with logits.

The only file that reads their attributes for this; a model of another origin answers None or nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite.errors import CheckpointError, listing

# transformers' mark of tensors, and modules, that it must not initialize.
INITIALIZED = "_is_hf_initialized"


@dataclass(frozen=True)
class _Pending:
    """A buffer that a model has to compute: its module, its name there, the empty tensor and the version of that."""

    module: nn.Module
    name: str
    empty: Tensor
    version: int

    @classmethod
    def of(cls, module: nn.Module, name: str) -> _Pending:
        """Puts an empty tensor on the CPU, NaN if it is one of floats, in place of the buffer on meta."""
        empty = torch.empty_like(module._buffers[name], device="cpu")  # type: ignore[arg-type]
        module._buffers[name] = empty = empty.fill_(torch.nan) if empty.is_floating_point() else empty
        return cls(module, name, empty, empty._version)

    @property
    def is_computed(self) -> bool:
        """Whether the buffer was written to, or exchanged, and holds no NaN."""
        now = self.module._buffers[self.name]
        assert now is not None
        written = now is not self.empty or now._version > self.version
        return written and not (now.is_floating_point() and not (now == now).all())


def fill_computed_buffers_(model: nn.Module, device: torch.device) -> None:
    """Computes the buffers that no checkpoint holds (rotary frequencies, positions) and that were left on meta.

    transformers computes them in `_init_weights` of the nearest model that encloses a module, called with the module,
    or with one above it that prepares its parts. Raises CheckpointError that lists the buffers that nothing computes.
    """
    pending = {
        path: [
            _Pending.of(module, name)
            for name, buffer in module.named_buffers(recurse=False)
            if buffer.is_meta and name in module._non_persistent_buffers_set
        ]
        for path, module in model.named_modules()
    }
    causes: list[Exception] = []
    for path, buffers in pending.items():
        for depth in range(path.count(".") + bool(path), -1, -1):
            if all(buffer.is_computed for buffer in buffers):
                break
            try:
                _initialize_parts_(model, ".".join(path.split(".")[:depth]), pending)
            except (AttributeError, RuntimeError, TypeError) as error:  # weights that are packed or on meta
                causes.append(error)
    made = [(path, buffer) for path, buffers in pending.items() for buffer in buffers]
    if lost := [f"{path}.{buffer.name}".lstrip(".") for path, buffer in made if not buffer.is_computed]:
        cause = causes[0] if causes else None
        raise CheckpointError(f"transformers does not compute {listing(lost)}, which no file holds") from cause
    for _, buffer in made:
        buffer.module._buffers[buffer.name] = buffer.module._buffers[buffer.name].to(device)  # type: ignore[union-attr]


@torch.no_grad()
def _initialize_parts_(model: nn.Module, path: str, pending: Mapping[str, Collection[_Pending]]) -> None:
    """Runs transformers' initialization of a module, which may reach into its parts, on the pending buffers alone.

    Everything else in it is hidden on meta, with transformers' mark of what is initialized, and restored afterwards.
    """
    module, enclosing = model.get_submodule(path), model
    for depth in range(path.count(".") + bool(path) + 1):
        part = model.get_submodule(".".join(path.split(".")[:depth]))
        enclosing = part if _is_transformers_model(part) else enclosing
    empty = {id(buffer.module._buffers[buffer.name]) for buffers in pending.values() for buffer in buffers}
    stores: list[dict[str, Any]] = [store for part in module.modules() for store in (part._parameters, part._buffers)]
    held = [(store, {name: tensor for name, tensor in store.items() if id(tensor) not in empty}) for store in stores]
    parts = [part for part in module.modules() if not hasattr(part, INITIALIZED)]
    try:
        for store, tensors in held:
            for name, tensor in tensors.items():
                if tensor is not None:
                    store[name] = hidden = tensor.to("meta", copy=True)
                    setattr(hidden, INITIALIZED, True)
        for part in parts:  # a packed weight is a module
            setattr(part, INITIALIZED, True)
        enclosing._init_weights(module)  # type: ignore[operator]
    finally:
        for store, tensors in held:
            store.update(tensors)
        for part in parts:
            delattr(part, INITIALIZED)


def tensors_on_meta(model: nn.Module) -> list[str]:
    """Returns the names of parameters, buffers and other tensors of a model that are on the meta device."""
    found = []
    for path, module in model.named_modules(remove_duplicate=False):
        held = {**module._parameters, **module._buffers, **vars(module)}
        names = [name for name, tensor in held.items() if isinstance(tensor, Tensor) and tensor.is_meta]
        found += [f"{path}.{name}".lstrip(".") for name in names]
    return found


def keep_weights_(model: nn.Module) -> None:
    """Stops a model from changing its weights when it is called.

    In eval, RWKV halves weights in place every few layers, and its hidden states with them, against overflow in
    float16. An export would have the halved ones.
    """
    for module in model.modules():
        if hasattr(module, "_rescale_layers"):
            module._rescale_layers = _nothing  # type: ignore[assignment]


def _nothing() -> None:
    pass


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
    # Older releases of transformers saved positions, which are computed now.
    positions = [r"(^|\.)position_ids$"] if any(n.endswith("position_ids") for n, _ in model.named_buffers()) else []
    return [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []), r"rotary_emb\.inv_freq$", *positions]


def kept_unpacked(model: nn.Module) -> list[str]:
    """Returns patterns of module names that transformers never packs in this architecture."""
    return list(getattr(model, "_keep_in_fp32_modules", None) or [])


def kept_in_float32(model: nn.Module) -> list[str]:
    """Returns patterns of names that transformers keeps in float32 when it loads in float16, or in 16 bits at all."""
    return [*kept_unpacked(model), *(getattr(model, "_keep_in_fp32_modules_strict", None) or [])]


def config_value(config: object, name: str) -> Any:
    """Returns an entry of a transformers config; None if there is none, or one for each layer (Gemma 4, dots3)."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' answer to a question about the whole model that only a layer can answer
        return None


def longest_sequence(config: object) -> int | None:
    """Returns the number of positions that a model was made for, None if its config does not give it."""
    found: int | None = config_value(config, "max_position_embeddings")
    return found


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


def _is_transformers_model(module: nn.Module) -> bool:
    return any(kind.__name__ == "PreTrainedModel" for kind in type(module).__mro__)


def base_model(model: Any) -> Any:
    """Returns the model under the output head. Llama 4 names another attribute for it than it has."""
    named = model.base_model
    return next(filter(_is_transformers_model, model.children()), named) if named is model else named


def hidden_states(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Returns the last hidden state `(batch, tokens, features)`, the input of the output head."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return base_model(model)(**inputs, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


def logit_options(model: Any) -> dict[str, float]:
    """Returns what the model does with the logits of its head, as arguments of `linear_cross_entropy`."""
    options: dict[str, float] = {}
    if softcap := config_value(model.config, "final_logit_softcapping"):  # Gemma
        options["softcap"] = softcap
    scale = config_value(model.config, "logit_scale")
    if scale and isinstance(scale, (int, float)):  # Cohere multiplies; MPT has the name of a formula, which it ignores
        options["logit_scale"] = scale
    if scaling := config_value(model.config, "logits_scaling"):  # Granite divides
        options["logit_scale"] = 1 / scaling
    return options
