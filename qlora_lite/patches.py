"""Temporary patches of torch and transformers: every foreign function that the package replaces, and the reason.

Each patch is a context manager. At the end of the block it restores the state that it found, also if that was a patch
by somebody else, or an attribute inherited from a class. Patches of classes and modules of torch and transformers
concern the whole process, so two threads must not hold them at the same time.

patched_attribute        an attribute of one object: what a trainer calls of a model
patched_forward          the forward of one module: recomputation, memory checks, fused nodes, weights read on demand
patched_attention        transformers' `sdpa` attention function: a faster one for causal attention on a CPU
patched_mask_creation    transformers' test for tracing: masks on fake tensors as on real ones
patched_module_apply     torch's `Module._apply`: `Module.to` on fake tensors
patched_storage_resize   torch's `UntypedStorage.resize_`: memory that no dispatch mode sees
patched_template_date    transformers' clock for chat templates: texts that do not depend on the day of the run
patched_compile          torch's `compile`: functions of an imported module that are compiled at their first call

`exchange_attention_` is not temporary: it registers a function under a name of its own with transformers, as
transformers offers, and tells one model to use it.
"""

from __future__ import annotations

import copy
import datetime
import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qlora_lite.architecture import is_transformers_model

SDPA = "sdpa"
_INHERITED = object()
# What a module with a patched forward has of its own.
_OF_PATCH = ("forward", "__deepcopy__")

AnyFunction = Callable[..., object]


@contextmanager
def patched_attribute(owner: object, name: str, value: object) -> Iterator[None]:
    """Sets an attribute within the block; afterwards it is as before, in the owner itself or inherited."""
    before = vars(owner).get(name, _INHERITED)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is _INHERITED:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


@contextmanager
def patched_forward(module: nn.Module, forward: AnyFunction) -> Iterator[None]:
    """Makes `forward` the forward of one module within the block.

    The module stays in its place, so that names, hooks, and the code of its parents are unchanged. A deep copy that is
    made of it within the block is as the module was before.
    """
    own = vars(module)
    before = {name: own[name] for name in _OF_PATCH if name in own}

    def deep_copy(memo: dict[int, Any]) -> nn.Module:
        patched = {name: own.pop(name) for name in _OF_PATCH}
        own.update(before)  # of another patch around this one, or of the module itself
        try:
            return copy.deepcopy(module, memo)
        finally:
            for name in before:
                del own[name]
            own.update(patched)

    with patched_attribute(module, "forward", forward), patched_attribute(module, "__deepcopy__", deep_copy):
        yield


class _AttentionFunctions(Protocol):
    """transformers' registry of attention functions: local entries hide those that are registered for all."""

    _local_mapping: dict[str, AnyFunction]

    def __getitem__(self, name: str) -> AnyFunction: ...

    def __setitem__(self, name: str, function: AnyFunction) -> None: ...

    def __delitem__(self, name: str) -> None: ...


@contextmanager
def patched_attention(model: nn.Module, make: Callable[[AnyFunction], AnyFunction]) -> Iterator[None]:
    """Replaces transformers' `sdpa` attention function f by `make(f)` within the block, if this model uses it.

    Attention is a function that transformers' modules look up by name, so there is no module whose forward could be
    patched. The registry is shared by all models.
    """
    if getattr(getattr(model, "config", None), "_attn_implementation", None) != SDPA:
        yield
        return
    functions: _AttentionFunctions = importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    before, was_local = functions[SDPA], SDPA in functions._local_mapping
    functions[SDPA] = make(before)
    try:
        yield
    finally:
        functions[SDPA] = before
        if not was_local:  # a later registration for all models is then visible again
            del functions[SDPA]


def exchange_attention_(
    model: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None
) -> str | None:
    """Makes a model use another of transformers' attention functions; returns the name of the one before.

    make: makes the function of this name, if transformers does not know it yet, from its `sdpa` one. It is registered
    with the masks of that one; only models that are told so use it. Returns None, and changes nothing, if the model, or
    a model in it, uses another one than `sdpa`, or does not look it up by name.
    """
    if not is_transformers_model(model):
        return None
    before: set[str] = {part.config._attn_implementation for part in model.modules() if is_transformers_model(part)}
    if len(before) != 1 or (make is not None and before != {SDPA}) or not model._can_set_attn_implementation():
        return None
    modeling = importlib.import_module("transformers.modeling_utils")
    masking = importlib.import_module("transformers.masking_utils")
    if make is not None and name not in modeling.ALL_ATTENTION_FUNCTIONS:
        modeling.AttentionInterface.register(name, make(modeling.ALL_ATTENTION_FUNCTIONS[SDPA]))
        masking.AttentionMaskInterface.register(name, masking.ALL_MASK_ATTENTION_FUNCTIONS[SDPA])
    model.set_attn_implementation(name)
    return before.pop()


def loss_output(loss: Tensor) -> Any:
    """Returns transformers' output of a language model that computed a loss and nothing else."""
    return importlib.import_module("transformers.modeling_outputs").CausalLMOutputWithPast(loss=loss)


@contextmanager
def patched_mask_creation() -> Iterator[None]:
    """Makes transformers create the same attention masks for fake tensors as for real ones, within the block.

    transformers leaves out a mask that hides nothing, unless it believes to be traced, because a traced graph has to
    hold for other masks too. It takes a fake tensor for a sign of tracing. In a rehearsal it is not: a mask that the
    real step does not have would be counted, and would keep attention from its fast path.
    """
    masks = importlib.import_module("transformers.masking_utils")
    is_tracing: Callable[[], bool] = masks.is_tracing
    with patched_attribute(masks, "is_tracing", lambda tensor=None: is_tracing()):
        yield


def _apply_to_data(module: nn.Module, change: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """`Module._apply` as torch runs it for real tensors: parameters stay the same objects and get new data."""
    for child in module.children() if recurse else ():
        child._apply(change)
    with torch.no_grad():
        for parameter in module._parameters.values():
            for tensor in () if parameter is None else (parameter, parameter.grad):
                if tensor is not None and (changed := change(tensor)) is not tensor:
                    tensor.data = changed
    for name, buffer in module._buffers.items():
        module._buffers[name] = None if buffer is None else change(buffer)
    return module


@contextmanager
def patched_module_apply() -> Iterator[None]:
    """Makes `Module.to` and its like work on fake tensors within the block.

    torch swaps fake parameters as whole objects, because the device of one cannot be changed by `.data`, and fails
    where the conversion returns the parameter itself.
    """
    with patched_attribute(nn.Module, "_apply", _apply_to_data):
        yield


@contextmanager
def patched_storage_resize(resized: Callable[[torch.UntypedStorage], None]) -> Iterator[None]:
    """Calls `resized` after every `UntypedStorage.resize_` within the block; no dispatch mode sees that method."""
    resize: Callable[[torch.UntypedStorage, int], object] = torch.UntypedStorage.resize_

    def resize_(storage: torch.UntypedStorage, size: int) -> object:
        result = resize(storage, size)
        resized(storage)
        return result

    with patched_attribute(torch.UntypedStorage, "resize_", resize_):
        yield


@functools.lru_cache(maxsize=8)
def _clock_stopped_at(date: datetime.date) -> type[datetime.datetime]:
    """`datetime.datetime` with a `now` that is midnight of this date."""

    class StoppedClock(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> StoppedClock:
            return cls(date.year, date.month, date.day, tzinfo=tz)

    return StoppedClock


@contextmanager
def patched_template_date(date: datetime.date) -> Iterator[None]:
    """Makes `strftime_now` of chat templates write this date, at midnight, within the block.

    transformers defines `strftime_now` by `datetime.now()`, and gives a template no function of the caller's: callables
    among its variables become text.
    """
    module = importlib.import_module("transformers.utils.chat_template_utils")
    with patched_attribute(module, "datetime", _clock_stopped_at(date)):
        yield


def _compiled_at_first_call(function: AnyFunction, make: Callable[[AnyFunction], AnyFunction]) -> AnyFunction:
    @functools.cache
    def compiled() -> AnyFunction:
        return make(function)

    @functools.wraps(function)
    def call(*args: object, **options: object) -> object:
        # Within a function that is compiled already, this one is part of it.
        return (function if torch.compiler.is_compiling() else compiled())(*args, **options)

    return call


@contextmanager
def patched_compile() -> Iterator[None]:
    """Makes `torch.compile` compile a function at its first call, not where it is decorated, within the block.

    `torch.compile` imports torch's compiler, which takes longer than all of torch. A module that decorates functions
    imports it although nobody may call them.
    """
    compile = torch.compile

    def compile_later(model: Any = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(compile_later, **options)
        return _compiled_at_first_call(model, functools.partial(compile, **options))

    with patched_attribute(torch, "compile", compile_later):
        yield
