"""Training steps of transformers + peft + bitsandbytes, on a real model or on fake tensors.

A step is set up as those libraries' documentation recommends, so that the same code can be rehearsed
(`qlora_lite.planning.rehearsal`) and measured (`MemoryProfiler`). `stand_in_` makes the model of a rehearsal.
bitsandbytes' layers cannot be built from fake tensors, because its parameters have a class of their own. They are built
on meta, where nothing has bytes, and each tensor is replaced inside the rehearsal; packed ones come from bitsandbytes'
own functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.checkpoints import hub
from qlora_lite.memory.profiler import MemoryProfiler
from qlora_lite.quantization.kernels import import_bitsandbytes

BLOCKSIZE = 64
STEPS = 2  # the second step shows the optimizer's states together with activations
LEARNING_RATE = 2e-4


@dataclass(frozen=True)
class PeftWork:
    """One set-up: the format of the base (nf4, fp4, int8, none), the adapter, checkpointing, and the batch.

    targets: names of layers, or `all-linear`. checkpointing: `none`, `full`, or `reentrant`.
    autocast: compute in bfloat16 and cast logits to fp32, as the Trainer of transformers does with `bf16=True`.
    casting: the weights that are fp32 in the end: `prepare`, those of peft's `prepare_model_for_kbit_training`;
        `norms`, those of norms alone (trl casts embedding and head back to bfloat16); `none`, none.
    """

    format: str = "nf4"
    rank: int = 16
    targets: str | tuple[str, ...] = "all-linear"
    checkpointing: str = "full"
    rows: int = 2
    tokens: int = 512
    dropout: float = 0.0
    autocast: bool = False
    casting: str = "prepare"


def quantization(format: str, compute: torch.dtype = torch.bfloat16) -> Any:
    """Returns the BitsAndBytesConfig of a format, None for `none`. compute: dtype of products with 4-bit weights."""
    from transformers import BitsAndBytesConfig

    if format == "none":
        return None
    if format == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=format,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def load_base(folder: Path, format: str, compute: torch.dtype = torch.bfloat16) -> Any:
    """Loads a checkpoint with transformers, with its base packed."""
    from transformers import AutoModelForCausalLM

    packing = quantization(format, compute)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=packing, dtype=torch.bfloat16)


def skeleton(config: Any, format: str) -> Any:
    """Returns the model of a config on meta, with bitsandbytes' layers where transformers puts them."""
    model: Any = hub.empty_model(config, torch.bfloat16)
    if format != "none":
        import_bitsandbytes("bitsandbytes")
        from transformers.integrations.bitsandbytes import replace_with_bnb_linear

        replace_with_bnb_linear(model, ["lm_head"], quantization(format))
        setattr(model, "is_loaded_in_8bit" if format == "int8" else "is_loaded_in_4bit", True)
        model.quantization_method = quantization(format).quantization_method()
        model.config.quantization_config = quantization(format)
    architecture.tie(model)
    return model


def _pack_4bit(weight: Tensor, module: Any, found: Any) -> nn.Parameter:
    bnb = import_bitsandbytes("bitsandbytes.functional")
    codes, state = bnb.quantize_4bit(weight, blocksize=BLOCKSIZE, compress_statistics=True, quant_type=found.quant_type)
    packed = nn.Parameter(codes, requires_grad=False)
    packed.__dict__.update({**vars(found), "quant_state": state, "bnb_quantized": True})
    module.quant_state = state
    return packed


def _pack_8bit(weight: Tensor, module: Any, found: Any) -> nn.Parameter:
    codes, scales, _ = import_bitsandbytes("bitsandbytes.functional").int8_vectorwise_quant(weight.half())
    packed: Any = nn.Parameter(codes, requires_grad=False)
    packed.CB, packed.SCB, packed.has_fp16_weights = codes, scales, False
    return packed  # type: ignore[no-any-return]


PACKERS: dict[str, Callable[[Tensor, Any, Any], nn.Parameter]] = {"Params4bit": _pack_4bit, "Int8Params": _pack_8bit}


def stand_in_(model: nn.Module) -> Any:
    """Replaces each tensor on meta by a new one, which is fake inside a rehearsal, and returns the model."""
    made: dict[int, nn.Parameter] = {}  # tied parameters stay tied
    for module in model.modules():
        for name, found in module.named_parameters(recurse=False):
            if id(found) not in made:
                # bitsandbytes' class does not keep the weight's dtype on meta; before packing, the base is bfloat16.
                dtype = torch.bfloat16 if found.is_floating_point() else found.dtype
                weight = torch.empty(found.shape, dtype=dtype)
                pack = PACKERS.get(type(found).__name__)
                made[id(found)] = nn.Parameter(weight, False) if pack is None else pack(weight, module, found)
                del weight
            module._parameters[name] = made[id(found)]
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
    return model


def _prepared(model: Any, work: PeftWork) -> Any:
    """Returns the model with its adapters, ready to train."""
    import peft

    checkpointing = work.checkpointing != "none"
    options = {"use_reentrant": work.checkpointing == "reentrant"} if checkpointing else None
    if work.casting == "none":
        for parameter in model.parameters():
            parameter.requires_grad = False
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable(options)
    else:
        model = peft.prepare_model_for_kbit_training(model, checkpointing, options)
    if work.casting == "norms":
        for name, module in model.named_modules():
            if name.endswith(("lm_head", "embed_tokens")):
                module.to(torch.bfloat16)
    model.config.use_cache = False
    targets = work.targets if isinstance(work.targets, str) else list(work.targets)
    lora = peft.LoraConfig(r=work.rank, lora_alpha=2 * work.rank, lora_dropout=work.dropout, target_modules=targets)
    model = peft.get_peft_model(model, lora)
    if work.autocast:
        from accelerate.utils.operations import convert_outputs_to_fp32

        cast = torch.autocast("cpu", torch.bfloat16)
        model.forward = convert_outputs_to_fp32(cast(model.forward))
    return model.train()


def take_steps(model: Any, work: PeftWork, profiler: MemoryProfiler) -> tuple[Any, ...]:
    """Sets up training on a loaded base and takes steps, with the phases forward, backward and optimizer.

    Returns the objects that a trainer still holds afterwards: model, optimizer and batch.
    """
    model = _prepared(model, work)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=LEARNING_RATE)
    profiler.track(model, optimizer)
    ids = torch.zeros(work.rows, work.tokens, dtype=torch.int64)
    batch = {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}
    for _ in range(STEPS):
        with profiler.phase("forward"):
            loss = model(**batch).loss
        with profiler.phase("backward"):
            loss.backward()
        with profiler.phase("optimizer"):
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        del loss
    return model, optimizer, batch
