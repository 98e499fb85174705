"""trl's trainers on a packed base that is held once: `from qlora_lite.integrations.trl import SFTTrainer`.

Each trainer is trl's own with four differences:

- the model is fused (`fuse_`), and recomputes its blocks if `args.gradient_checkpointing` says so;
- `peft_config` may be a plain `peft.LoraConfig`, which is made fit for packed layers (`prepare_`);
- log-probabilities of tokens come from `token_statistics`, so that neither logits nor tiles of them are kept;
- checkpoints have adapters only, those of `add_lora_` too.

trl's trainers call `model(..., labels=labels, fused_lm_head=True)` after `trl.trainer.utils.add_fused_lm_head` has
prepared the model for it. While a trainer of this file is made, that function is replaced by `add_fused_lm_head` below,
which takes the same arguments.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.errors import ConfigError
from qlora_lite.generation import repacked_codes
from qlora_lite.integrations.peft import prepare_
from qlora_lite.integrations.transformers import AdapterCheckpoints
from qlora_lite.lora.adapters import lora_layers
from qlora_lite.patches import patched_attribute
from qlora_lite.training.config import FULL, NONE
from qlora_lite.training.forward.fuse import fuse_, fusion_of, without_peft
from qlora_lite.training.forward.log_probs import token_statistics

try:
    import trl
    from trl.trainer.utils import FusedCausalLMOutput
except ImportError as error:
    raise ConfigError(f"trl's trainers need trl 1.16 or later ({error}); run: pip install 'qlora-lite[trl]'") from error

ADD_HEAD = "add_fused_lm_head"
# Trainers of trl that have a name here.
TRAINERS = ("SFTTrainer", "DPOTrainer", "KTOTrainer", "RewardTrainer", "GRPOTrainer", "RLOOTrainer")
# Those that compare with a reference: the base with peft's adapters switched off. They would load a second model for
# adapters of another kind.
WITH_REFERENCE = ("DPOTrainer", "KTOTrainer", "GRPOTrainer", "RLOOTrainer")
# Asks a model for the loss of its routers.
ROUTERS: dict[str, Any] = {"output_router_logits": True}


def _no_labels(inputs: dict[str, Any]) -> Tensor:
    return torch.full_like(inputs["input_ids"][:, :1], -100)


def _output(
    model: nn.Module,
    statistics: tuple[str, ...],
    temperature: float,
    labels: Tensor,
    shift_labels: Tensor | None,
    items: Tensor | int | None,
    inputs: dict[str, Any],
) -> FusedCausalLMOutput:
    """Returns trl's output of a model with log-probabilities."""
    wants_routers = inputs.pop("output_router_logits", None)
    if wants_routers is None:
        wants_routers = architecture.declares_router_loss(model)
    inputs.pop("use_cache", None)
    chosen, outputs = labels if shift_labels is None else shift_labels, list[Any]()

    def with_routers(model: nn.Module, given: dict[str, Any]) -> Tensor:
        hidden, output = architecture.hidden_states_with_router_loss(model, given, _no_labels(given), **ROUTERS)
        outputs.append(output)
        return hidden

    found = token_statistics(
        model,
        labels=chosen,
        statistics=statistics,
        temperature=temperature,
        labels_are_shifted=shift_labels is not None,
        hidden_states=with_routers if wants_routers else None,
        **inputs,
    )
    mask = (chosen if shift_labels is not None else chosen[:, 1:]) != -100
    loss = -found.log_probs.sum() / (mask.sum().clamp(min=1) if items is None else items)
    of_routers = None
    if wants_routers:
        if not outputs:  # the figures came from logits
            no_labels = _no_labels(inputs)
            outputs.append(architecture.output_with_router_loss(model, inputs, no_labels, logits_to_keep=1, **ROUTERS))
        of_routers = outputs[-1].aux_loss  # without the coefficient of the config, as trl weighs it
        config = architecture.text_config(model.config)
        loss = loss + getattr(config, "router_aux_loss_coef", 0.0) * of_routers
    return FusedCausalLMOutput(loss=loss, **found._asdict(), label_mask=mask, aux_loss=of_routers)


def add_fused_lm_head(
    model: nn.Module,
    temperature: float = 1.0,
    cast_lm_head_to_fp32: bool = False,
    outputs: Iterable[str] = ("log_probs",),
) -> None:
    """In place of trl's function of this name: gives a model the call with `fused_lm_head=True`.

    Such a call returns trl's `FusedCausalLMOutput`, whose figures are those of `token_statistics`. Other calls are as
    before. Raises ConfigError for cast_lm_head_to_fp32, which a packed head does not have.
    """
    if cast_lm_head_to_fp32:
        raise ConfigError("cast_lm_head_to_fp32 is not available: the softmax is in fp32 without it; leave it out")
    own = model.forward
    statistics = tuple(name for name in outputs if name != "log_probs")

    def forward(self: nn.Module, *args: object, fused_lm_head: bool = False, **given: Any) -> Any:
        if not fused_lm_head:
            return own(*args, **given)
        if args:
            raise ConfigError("a call with fused_lm_head takes its inputs by name")
        labels, shifted, items = (given.pop(name, None) for name in ("labels", "shift_labels", "num_items_in_batch"))
        return _output(self, statistics, temperature, labels, shifted, items, given)

    forward.__signature__ = inspect.signature(own)  # type: ignore[attr-defined]
    model.forward = types.MethodType(forward, model)


class PackedTrainer(AdapterCheckpoints):
    """A base class to put before a trainer of trl: `class MyTrainer(PackedTrainer, trl.SFTTrainer): ...`.

    decode_copies: while completions are generated, hold a copy of the 4-bit codes from which tokens are computed faster
    on a CPU (`qlora_lite.generation.decode_copies`): 0.53 bytes a value. It is dropped before the training step.

    Raises ConfigError for a model that is named by a string, for one without adapters if there is no peft_config, and
    for adapters of `add_lora_` where the trainer compares with a reference.
    """

    def __init__(self, *args: Any, decode_copies: bool = False, **options: Any) -> None:
        given = inspect.signature(super().__init__).bind(*args, **options)
        model, config = (given.arguments.get(name) for name in ("model", "peft_config"))
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"the model must be one of load_quantized; got {model!r}: pass load_quantized({model!r}, QuantConfig())"
            )
        inner = without_peft(model)
        if config is not None:
            given.arguments["peft_config"] = prepare_(config, inner)
        elif inner is model:
            _check_adapters(model, type(self))
        if fusion_of(inner) is None:
            fuse_(inner, _checkpointing(given.arguments.get("args")))
        with ExitStack() as stack:
            for module in _modules_with_head(type(self)):
                stack.enter_context(patched_attribute(module, ADD_HEAD, add_fused_lm_head))
            super().__init__(*given.args, **given.kwargs)
        if decode_copies:
            generate: Any = inner.generate
            inner.generate = functools.partial(_generate_with_copies, inner, generate)  # type: ignore[assignment]


def _generate_with_copies(model: nn.Module, generate: Callable[..., Any], *args: Any, **options: Any) -> Any:
    with repacked_codes.decode_copies(model):
        return generate(*args, **options)


def _checkpointing(args: Any) -> str:
    """Returns what the arguments of a trainer say about checkpointing, as `fuse_` takes it; trl's default is `full`."""
    if (getattr(args, "gradient_checkpointing_kwargs", None) or {}).get("selective"):
        raise ConfigError(
            "selective checkpointing of trl does not fit a fused model, which keeps attention and products itself; "
            "leave `selective` out of gradient_checkpointing_kwargs"
        )
    return FULL if getattr(args, "gradient_checkpointing", True) else NONE


def _check_adapters(model: nn.Module, trainer: type) -> None:
    if not lora_layers(model):
        raise ConfigError("the model has no adapters; pass peft_config=peft.LoraConfig(...), or add_lora_ first")
    if any(kind.__name__ in WITH_REFERENCE for kind in trainer.__mro__):
        raise ConfigError(
            f"{trainer.__name__} compares with the base, and switches off peft's adapters alone, not those of "
            f"add_lora_; pass the model without them and peft_config=peft.LoraConfig(...)"
        )


def _modules_with_head(trainer: type) -> list[types.ModuleType]:
    """Returns the modules of a trainer's classes that call `add_fused_lm_head`."""
    modules = (sys.modules[kind.__module__] for kind in trainer.__mro__)
    return list(
        dict.fromkeys(module for module in modules if hasattr(module, ADD_HEAD) and module.__name__ != __name__)
    )


@functools.cache
def packed(trainer: type) -> Any:
    """Returns a class of trl's trainers with the differences of this file, under the same name."""
    return type(trainer.__name__, (PackedTrainer, trainer), {"__doc__": trainer.__doc__, "__module__": __name__})


def __getattr__(name: str) -> Any:
    if name in TRAINERS:
        return packed(getattr(trl, name))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *TRAINERS})
