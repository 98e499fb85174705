"""Facts about transformers models: head, embedding, tied weights, sizes, what they do with logits.

The only file that reads their attributes for this; a model of another origin answers None or nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite.errors import CheckpointError, ConfigError, listing

# transformers' mark of tensors, and modules, that it must not initialize.
INITIALIZED = "_is_hf_initialized"
# Of an array of images in a batch, `pixel_values`, the entry `pixel_values.rows` has the number of entries of each row.
ROWS = ".rows"


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
        enclosing = part if is_transformers_model(part) else enclosing
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


def initialize_(model: nn.Module, names: Collection[str], device: torch.device) -> None:
    """Gives parameters that are on meta the values that transformers starts them with, the same in each call.

    Raises CheckpointError that lists those which the model does not initialize.
    """
    owners: dict[str, list[str]] = {}
    for name in names:
        owner, _, key = name.rpartition(".")
        owners.setdefault(owner, []).append(key)
    lost = []
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for path, keys in owners.items():
            module: Any = model.get_submodule(path)
            for key in keys:
                empty = torch.full_like(module._parameters[key], torch.nan, device="cpu")
                module._parameters[key] = nn.Parameter(empty, requires_grad=False)
            model._init_weights(module)  # type: ignore[operator]
            for key in keys:
                value = module._parameters[key].data
                lost += [] if bool(value.isfinite().all()) else [f"{path}.{key}"]
                module._parameters[key] = nn.Parameter(value.to(device), requires_grad=False)
    if lost:
        raise CheckpointError(f"transformers does not initialize {listing(lost)}, which the checkpoint lacks")


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


def dtype_as_loaded(model: Any, name: str, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that transformers gives a float of this name when it loads the model in `dtype`.

    It is another one for what `_keep_in_fp32_modules` and `_keep_in_fp32_modules_strict` match.
    """
    kept: Mapping[str, torch.dtype] = model._get_dtype_plan(dtype) if hasattr(model, "_get_dtype_plan") else {}
    return next((kept[pattern] for pattern in kept if re.search(pattern.replace("*", ".*"), name)), dtype)


def text_config(config: Any) -> Any:
    """Returns the part of a config that describes the language model: of a model for text, the config itself."""
    parts = getattr(config, "get_text_config", None)
    return parts() if callable(parts) else config


def input_embedding(model: nn.Module) -> nn.Module | None:
    """Returns the input embedding, or None for a model without `get_input_embeddings()`."""
    return _named_module(model, "get_input_embeddings")


def output_head(model: nn.Module) -> nn.Module | None:
    """Returns the output head, or None for a model without `get_output_embeddings()`."""
    return _named_module(model, "get_output_embeddings")


def _named_module(model: nn.Module, getter: str) -> nn.Module | None:
    get: Callable[[], nn.Module | None] | None = getattr(model, getter, None)
    return get() if callable(get) else None


def is_reversible(model: nn.Module) -> bool:
    """Whether the model has reversible layers, which compute their inputs again from their outputs (Reformer)."""
    return getattr(getattr(model, "config", None), "model_type", None) == "reformer"


def vocabulary_size(model: nn.Module) -> int | None:
    """Returns the number of rows of the input embedding, or None for a model without one."""
    return getattr(input_embedding(model), "num_embeddings", None)


def is_transformers_model(module: nn.Module) -> bool:
    """Whether this is a model of transformers, or a part of one that is a model itself."""
    return any(kind.__name__ == "PreTrainedModel" for kind in type(module).__mro__)


def base_model(model: Any) -> Any:
    """Returns the model under the output head; the model itself if there is none.

    Llama 4 names another attribute for it than it has; there it is the innermost model that holds the input embedding.
    """
    named = getattr(model, "base_model", model)
    if named is not model:
        return named
    embedding = input_embedding(model)
    parts = [part for part in model.children() if is_transformers_model(part)]
    inner = next((part for part in parts if any(module is embedding for module in part.modules())), None)
    return model if inner is None else base_model(inner)


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns what a model takes of a batch: all but its labels, and what says which row an array belongs to."""
    return {name: value for name, value in batch.items() if name != "labels" and not name.endswith(ROWS)}


def hidden_states(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Returns the last hidden state `(batch, tokens, features)`, the input of the output head."""
    inputs = model_inputs(batch)
    return base_model(model)(**inputs, use_cache=False).last_hidden_state  # type: ignore[no-any-return]


def declares_router_loss(model: Any) -> bool:
    """Whether the config asks for a loss that spreads the tokens evenly over experts (`output_router_logits`)."""
    config = getattr(model, "config", None)
    return any(config_value(part, "output_router_logits") is True for part in (config, text_config(config)))


def z_loss_coefficient(model: Any) -> float:
    """Returns the factor of the loss on the logits' size that the config asks for; 0 if it does not (Bamba)."""
    return float(config_value(getattr(model, "config", None), "z_loss_coefficient") or 0)


def output_with_router_loss(model: Any, batch: dict[str, Tensor], no_labels: Tensor, **options: object) -> Any:
    """Returns the model's output for labels of which none counts: its `loss` is that of the routers alone.

    The factor and the arithmetic of that loss are the model's own.
    no_labels: ignored labels, for each token whose logits the model computes. options: further arguments of the model.
    Raises ConfigError for a model that does not compute such a loss.
    """
    inputs = model_inputs(batch)
    # With a number of items, the cross-entropy is a sum, which is 0 without labels; a mean would be NaN.
    options |= {"num_items_in_batch": 1, "use_cache": False}
    try:
        output = model(**inputs, labels=no_labels, **options)
        if not isinstance(getattr(output, "loss", None), Tensor):
            raise ValueError("it returns no loss")
    except (TypeError, ValueError, AttributeError) as error:
        first_line = str(error).partition("\n")[0]
        raise ConfigError(
            f"the config of a {type(model).__name__} asks for a loss of its routers (output_router_logits), which the "
            f"model does not compute ({type(error).__name__}: {first_line}); set output_router_logits to false"
        ) from error
    return output


def hidden_states_with_router_loss(
    model: Any, batch: dict[str, Tensor], no_labels: Tensor, **options: object
) -> tuple[Tensor, Any]:
    """Returns the last hidden states, as `hidden_states`, and `output_with_router_loss`, of one forward.

    no_labels: ignored labels (rows, 1), because the logits of one token of each row are computed on the way.
    """
    outputs: list[Any] = []
    with base_model(model).register_forward_hook(lambda module, args, output: outputs.append(output)):
        output = output_with_router_loss(model, batch, no_labels, logits_to_keep=1, **options)
    return outputs[-1].last_hidden_state, output


def logit_options(model: Any) -> dict[str, float]:
    """Returns what the model does with the logits of its head, as arguments of `linear_cross_entropy`."""
    config = text_config(model.config)
    options: dict[str, float] = {}
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):  # Gemma's kinds, xLSTM
        if softcap := config_value(config, name):
            options["softcap"] = softcap
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere and Falcon-H1 multiply
        scale = config_value(config, name)
        if scale and isinstance(scale, (int, float)):  # MPT has the name of a formula, which it ignores
            options["logit_scale"] = scale
    if scaling := config_value(config, "logits_scaling"):  # Granite divides, HyperCLOVA X multiplies
        options["logit_scale"] = scaling if str(config.model_type).startswith("hyperclovax") else 1 / scaling
    return options
