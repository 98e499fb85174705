"""`fuse_`: gives a model the forward that `train` runs, for other training loops: transformers' Trainer, trl, your own.

Three things stay with the model until `unfuse_`: the fused functions of its norms, gates and attention
(fused_forward.py), what is recomputed in backward (activation_checkpointing.py), and a loss without the logits of all
tokens where the model is called with labels.

Everything is held by the instance, as methods bound to it and partials of its modules. So a deep copy has its own, and
other models of the same class have none.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.choices import Choices, choices_in_force
from qlora_lite.choosing.machine_table import device_choices
from qlora_lite.compute.devices import model_device, model_dtype, on_cpu
from qlora_lite.compute.host_memory import set_host_limits
from qlora_lite.data.batching import Batch, labelled_tokens
from qlora_lite.errors import ConfigError
from qlora_lite.patches import exchange_attention_, loss_output, patched_forward
from qlora_lite.sharding.base import check_whole
from qlora_lite.tasks import CAUSAL_LM, task_of
from qlora_lite.training.config import FULL, NONE, check_checkpointing
from qlora_lite.training.forward.activation_checkpointing import (
    BlockCheckpointing,
    checkpointable_blocks,
    is_recomputed_forward,
)
from qlora_lite.training.forward.byte_budget import fit_budget
from qlora_lite.training.forward.fused_forward import (
    CausalMasks,
    fused_attention,
    fused_forwards,
    is_fused_forward,
)
from qlora_lite.training.objective.choice import checked_loss, head_reason
from qlora_lite.training.objective.losses import LOGIT_FREE, LOSSES, OF_MODEL
from qlora_lite.training.objective.made_up_rows import TEXT_INPUTS
from qlora_lite.training.objective.packing import check_packing, is_packed
from qlora_lite.training.objective.positions import check_positions

ATTRIBUTE = "fusion"
# The name under which transformers knows the fused attention.
ATTENTION = "qlora_lite_sdpa"
# Tensors with which a forward computes something else than the loss without logits.
OWN_FORWARD = ("shift_labels", "logits_to_keep", "inputs_embeds")
# Other arguments that the call with labels follows. Any further one that is not a tensor, None or False asks for more.
FOLLOWED = ("num_items_in_batch", "return_dict")
# Entries of a config that ask for outputs in every call.
OUTPUTS = ("output_hidden_states", "output_attentions")
METHODS = ("forward", "_set_gradient_checkpointing", "_replicate_for_data_parallel")


@dataclass
class ChosenLoss:
    """The loss for labels, found out in the first call with labels: its fields in a `Fusion`."""

    loss: str | None = None
    logits_reason: str | None = None
    packing_checked: bool = False


@dataclass
class Fusion:
    """What `fuse_` gave to a model, as `model.fusion`.

    modules: names of the modules with a fused forward. blocks: of the blocks that may be recomputed. dial: decides
    which of them are. keep_logits: whether a call with labels is left as it is. recomputing: what the dial is set to
    when transformers' gradient checkpointing is switched on. loss: the key in LOSSES of the loss for labels, None
    before the first call with labels. logits_reason: why that loss takes the logits of all tokens, None if it does not.
    packing_checked: whether packed rows came before. attention: the name of the attention function before, None if it
    was not exchanged.
    """

    modules: list[str]
    blocks: list[str]
    dial: BlockCheckpointing
    keep_logits: bool
    recomputing: str | int
    attention: str | None = None
    loss: str | None = None
    logits_reason: str | None = None
    packing_checked: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Fusion:
        return replace(self, dial=copy.deepcopy(self.dial, memo))

    def __reduce__(self) -> Any:
        # The methods of the model would be read back as those of its class, and the model be fused by half.
        raise ConfigError("a fused model cannot be pickled; unfuse_ it first, or save its adapters (save_adapter)")


def without_peft(model: Any) -> nn.Module:
    """Returns the model that a model of peft has wrapped, whose layers it has adapted; any other model itself."""
    get = getattr(model, "get_base_model", None)
    found: nn.Module = get() if callable(get) and hasattr(model, "peft_config") else model
    return found


def fusion_of(model: nn.Module) -> Fusion | None:
    """Returns what `fuse_` gave to a model, None if it is not fused."""
    found = vars(model).get(ATTRIBUTE)
    return found if isinstance(found, Fusion) else None


@contextmanager
def own_forward(model: Any) -> Iterator[None]:
    """Within the block a fused model has the forward of its class; its modules stay fused. Others are left alone.

    Losses and checks call the model. What accelerate puts around its forward is entered already, and must not be
    entered twice: torch.autocast, entered again as the same object, stays on for ever.
    """
    if fusion_of(model) is None:
        yield
        return
    with patched_forward(model, types.MethodType(type(model).forward, model)):
        yield


def _switch_checkpointing(model: nn.Module, enable: bool = True, **options: object) -> None:
    """In place of transformers' method of this name: sets the dial, and leaves transformers' own recomputation off."""
    fusion = fusion_of(model)
    assert fusion is not None
    fusion.dial.set(fusion.recomputing if enable else NONE)


def _refuse_replicas(model: nn.Module) -> None:
    """In place of torch's method of this name: a replica would call the original, whose tensors are on one device."""
    raise ConfigError("a fused model does not run in torch.nn.DataParallel; start a process for each device (torchrun)")


def _recomputes(fusion: Fusion) -> bool:
    return torch.is_grad_enabled() and fusion.dial.kept < fusion.dial.blocks


@functools.cache
def _takes_cache(forward: Callable[..., Any]) -> bool:
    return "use_cache" in inspect.signature(forward).parameters


def _asks_for_more(model: Any, given: dict[str, Any]) -> bool:
    """Whether a call, or the model itself, asks for anything but the loss of a causal language model."""
    config = getattr(model, "config", None)
    if "_loss_function" in vars(model) or any(architecture.config_value(config, name) for name in OUTPUTS):
        return True
    return any(
        name in OWN_FORWARD if isinstance(value, Tensor) else name not in FOLLOWED
        for name, value in given.items()
        if value is not None and value is not False and (name != "logits_to_keep" or isinstance(value, Tensor) or value)
    )


def chosen_loss(model: nn.Module, known: ChosenLoss | Fusion, batch: Batch) -> str:
    """Returns the key in LOSSES of the loss for a batch, and notes it. First the model is tried, as in `train`.

    Called within `own_forward`. Raises the errors of `check_positions` and `checked_loss`.
    """
    check_positions(model, batch)
    # The start of a row may have some of the tokens of an image; without its values, they are tokens like others.
    text = {name: value for name, value in batch.items() if name in TEXT_INPUTS and value.dim() == 2}
    if "attention_mask" in batch and "attention_mask" not in text:  # masks of another form say what is packed
        text.pop("position_ids", None)
    if known.loss is None or (known.loss == LOGIT_FREE and head_reason(model) is not None):  # the head was changed
        known.loss, known.logits_reason = checked_loss(model, text)
        known.packing_checked = is_packed(text)
    elif is_packed(text) and not known.packing_checked:
        check_packing(model, text, min(2, len(text["input_ids"])))
        known.packing_checked = True
    return known.loss


def _forward(model: Any, args: tuple[object, ...], given: dict[str, Any]) -> Any:
    """Runs a fused model: the loss without logits if it is called with labels, by name; else its own forward."""
    own, fusion = type(model).forward, fusion_of(model)
    assert fusion is not None
    labels_only = given.get("labels") is not None and given.get("input_ids") is not None and not args
    if not labels_only or fusion.keep_logits or _asks_for_more(model, given):
        if _recomputes(fusion) and given.get("past_key_values") is None and _takes_cache(own):
            given = given | {"use_cache": False}  # recomputed blocks would leave it empty
        call: Callable[[], Any] = functools.partial(own, model, *args, **given)
    else:
        items = given.get("num_items_in_batch")
        batch = {name: value for name, value in given.items() if isinstance(value, Tensor) and value is not items}
        with own_forward(model):
            chosen = chosen_loss(model, fusion, batch)
        call = functools.partial(_loss_alone, model, chosen, batch, items, given)
    with own_forward(model):
        if isinstance(tokens := given.get("input_ids"), Tensor):
            fit_budget(model, fusion.dial, tokens.numel(), lambda: _sum_of(call()))
        return call()


def _loss_alone(model: Any, chosen: str, batch: Batch, items: Tensor | int | None, given: dict[str, Any]) -> Any:
    """Returns the output for a call with labels: the loss of this key in LOSSES, without logits."""
    if chosen == OF_MODEL:
        return type(model).forward(model, **given)
    loss = LOSSES[chosen](model, batch) / (labelled_tokens(batch) if items is None else items)
    return loss_output(loss) if given.get("return_dict") is not False else (loss,)


def _sum_of(output: Any) -> Tensor:
    """Returns the loss in a model's output, or the sum of its first tensor if there is none."""
    loss = None if isinstance(output, tuple) else getattr(output, "loss", None)
    found: Tensor = output[0] if loss is None else loss
    return found.float().sum()


@functools.cache
def _forward_of(kind: Any) -> Callable[..., Any]:
    """Returns the forward of a fused model of a class, with the signature of the class's own.

    Trainers read the signature. It is copied because functools.wraps leaves a trail to the class's own forward, which
    accelerate follows when it unwraps a model.
    """

    def forward(self: nn.Module, *args: object, **given: object) -> Any:
        return _forward(self, args, given)

    forward.__signature__ = inspect.signature(kind.forward)  # type: ignore[attr-defined]
    forward.__doc__ = kind.forward.__doc__
    return forward


def _with_choices(choices: Choices, forward: Callable[..., Any], *args: object, **given: object) -> Any:
    with choices_in_force(choices):
        return forward(*args, **given)


def _fuse_attention_(model: nn.Module) -> str | None:
    if not on_cpu(model_device(model)):
        return None
    return exchange_attention_(model, ATTENTION, lambda own: functools.partial(fused_attention, own, CausalMasks()))


def fuse_(model: nn.Module, checkpointing: str | int = "full", *, keep_logits: bool = False) -> Fusion:
    """Gives a model the forward that `train` runs, until `unfuse_`. Returns what was done, which is `model.fusion` too.

    checkpointing: `full` recomputes every block in backward, `none` keeps them all. A number of bytes limits the peak
        above the model's own bytes, AdamW's states included, as in `TrainConfig`; the first batch is then computed
        twice. Switching transformers' gradient checkpointing off, as its Trainer does, sets `none`, and switching it
        on what was given here, or `full`.
    keep_logits: leave calls with `labels` as they are, as those of classifiers, encoders and encoder-decoders always
        are. Otherwise these return the loss and no logits.

    In such a call the loss is the mean cross-entropy of the next token over all labelled tokens, or their sum divided
    by `num_items_in_batch`, which Trainer passes. A loss of routers that the config asks for is added in proportion to
    the labelled tokens. The first one makes the checks of `train`: causality, positions, packing. Other calls, those
    that ask for more outputs, and those of a model with a loss function of its own give what they gave before, except
    for rounding; where blocks are recomputed they return no cache.

    The model may be adapted before or after, by `add_lora_` or peft, and copied. `train` sets this aside while it runs.
    Raises ConfigError for a model that is fused already, that has a forward of its own as an instance, that recomputes
    its layers itself, or does so by transformers' gradient checkpointing; and for `full` if the model has no ModuleList
    of blocks. A fused model refuses to be pickled, and to run in DataParallel.
    """
    check_checkpointing(checkpointing)
    model = without_peft(model)
    check_whole(model, "another training loop than train")
    if fusion_of(model) is not None:
        raise ConfigError("the model is fused already; unfuse_ it first")
    if taken := [name for name in METHODS if name in vars(model)]:
        raise ConfigError(
            f"this {type(model).__name__} has a {taken[0]} of its own, set by another library; fuse_ it before "
            f"trainers and accelerate change it"
        )
    if architecture.is_reversible(model):
        raise ConfigError(f"a {type(model).__name__} recomputes all of its layers itself; train it with train")
    if any(getattr(module, "gradient_checkpointing", False) is True for module in model.modules()):
        raise ConfigError(
            "transformers' gradient checkpointing is on, and would recompute layers a second time; switch it off "
            "(model.gradient_checkpointing_disable()) before fuse_, which takes checkpointing='full'"
        )
    set_host_limits()
    named = {id(module): name for name, module in model.named_modules()}
    blocks = checkpointable_blocks(model, checkpointing)
    dial = BlockCheckpointing(model, len(blocks), checkpointing)
    forwards = fused_forwards(model)
    for name, forward in forwards.items():
        model.get_submodule(name).forward = forward
    choices = device_choices(model_device(model), model_dtype(model))
    for index, block in enumerate(blocks):  # in backward too, where a block is computed again
        block.forward = functools.partial(dial.run, index, functools.partial(_with_choices, choices, block.forward))
    keep_logits = keep_logits or task_of(model) is not CAUSAL_LM
    names, recomputing = [named[id(block)] for block in blocks], FULL if checkpointing == NONE else checkpointing
    fusion = Fusion(list(forwards), names, dial, keep_logits, recomputing, _fuse_attention_(model))
    setattr(model, ATTRIBUTE, fusion)
    kind: Any = type(model)
    model.forward = types.MethodType(_forward_of(kind), model)
    model._set_gradient_checkpointing = types.MethodType(_switch_checkpointing, model)  # type: ignore[assignment]
    model._replicate_for_data_parallel = types.MethodType(_refuse_replicas, model)  # type: ignore[method-assign]
    return fusion


def unfuse_(model: nn.Module) -> None:
    """Takes back what `fuse_` did. Raises ConfigError for a model that is not fused."""
    model = without_peft(model)
    fusion = fusion_of(model)
    if fusion is None:
        raise ConfigError("the model is not fused")
    # Adapters and trained copies may have moved the modules since, or copied them.
    for module in model.modules():
        forward = vars(module).get("forward")
        if is_fused_forward(forward) or is_recomputed_forward(forward):
            del module.forward
    for name in METHODS:
        vars(model).pop(name)
    delattr(model, ATTRIBUTE)
    if fusion.attention is not None:
        exchange_attention_(model, fusion.attention)


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Within the block a fused model is as it was before `fuse_`; then it is fused again. Others are left alone."""
    fusion = fusion_of(model)
    if fusion is None:
        yield
        return
    unfuse_(model)
    try:
        yield
    finally:
        again = fuse_(model, fusion.dial.checkpointing, keep_logits=fusion.keep_logits)
        again.recomputing, again.dial.costs = fusion.recomputing, fusion.dial.costs
