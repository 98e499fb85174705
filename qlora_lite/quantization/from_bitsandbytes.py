"""Converts layers that bitsandbytes packed to `QuantizedLinear`, sharing their bytes.

bitsandbytes' `Linear4bit` may arrive re-packed: on a CPU with AVX512-BF16, one forward pass in eval mode changes the
byte order of its weight in place and rounds its statistics to bfloat16. The order of the codes is restored exactly.
The rounded statistics are kept, since the model computes with them.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite.errors import QuantizationError
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.formats import eight_bit_format
from qlora_lite.quantization.kernels import bnb
from qlora_lite.quantization.layers import QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight

BNB_4BIT_MODULES = ("Linear4bit", "LinearNF4", "LinearFP4")
BNB_8BIT_MODULE = "Linear8bitLt"


def is_bitsandbytes(module: nn.Module) -> bool:
    return type(module).__module__.startswith("bitsandbytes.")


def _assign(empty: PackedWeight, **buffers: Tensor) -> PackedWeight:
    """Makes existing tensors the buffers of an empty `PackedWeight`, without copying them."""
    for name, tensor in buffers.items():
        expected: Tensor = getattr(empty, name)
        if tensor.numel() != expected.numel() or tensor.dtype != expected.dtype:
            got = f"{tuple(tensor.shape)} of {tensor.dtype}"
            raise QuantizationError(
                f"the packed layer's {name} should be {tuple(expected.shape)} of {expected.dtype}; got {got}"
            )
        setattr(empty, name, tensor.detach().view(expected.shape))
    return empty


def adopt_4bit(module: Any, name: str) -> PackedWeight:
    """Returns the weight of a bitsandbytes 4-bit layer. Its bytes are shared, or copied to restore their order."""
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        raise QuantizationError(
            f"{name} is a {type(module).__name__} without packed data; move the model to its device"
        )
    data: Tensor = module.weight.data
    absmax: Tensor = state.absmax
    nested = bool(state.nested)
    if getattr(state, "packing_format_for_cpu", False):
        plain = copy.copy(state)
        plain.original_nested = False  # keeps the statistics instead of packing them again
        data, _ = bnb._convert_weight_packed_for_cpu_inverse(data, plain)
        absmax, nested = state.absmax.T.reshape(-1).float(), False
    shape = (int(state.shape[0]), int(state.shape[1]))
    empty = PackedWeight(shape, state.quant_type, state.blocksize, nested, torch.device("meta"))
    buffers = {"packed": data.view(torch.uint8), "absmax": absmax}
    empty.plain_dtype = state.dtype
    if nested:
        buffers |= {"nested_absmax": state.state2.absmax, "nested_offset": state.offset.to(torch.float32)}
        buffers["nested_code"] = state.state2.code
    return _assign(empty, **buffers)


def adopt_8bit(module: Any, name: str) -> PackedWeight:
    """Returns the weight of a bitsandbytes `Linear8bitLt`, sharing its bytes."""
    state, weight = module.state, module.weight
    codes = state.CB if state.CB is not None else getattr(weight, "CB", None)
    absmax = state.SCB if state.SCB is not None else getattr(weight, "SCB", None)
    codes = weight.data if codes is None else codes
    if codes.dtype != torch.int8 or absmax is None:
        raise QuantizationError(
            f"{name} is a {type(module).__name__} without packed data; move the model to its device"
        )
    shape, format = (codes.shape[0], codes.shape[1]), eight_bit_format().name
    empty = PackedWeight(shape, format, device=torch.device("meta"))
    empty.plain_dtype = torch.float16 if module.bias is None else module.bias.dtype  # in which bitsandbytes multiplies
    return _assign(empty, packed=codes, absmax=absmax)


def converted(linear: nn.Linear, name: str, config: QuantConfig) -> QuantizedLinear:
    """Returns a `QuantizedLinear` with the bytes and the bias of a layer that bitsandbytes packed."""
    compute_dtype = config.compute_dtype
    if type(linear).__name__ in BNB_4BIT_MODULES:
        packed = adopt_4bit(linear, name)
        compute_dtype = compute_dtype or linear.compute_dtype  # type: ignore[assignment]
    elif type(linear).__name__ == BNB_8BIT_MODULE:
        packed = adopt_8bit(linear, name)
        packed.int8_activations = config.int8_activations
    else:
        raise QuantizationError(f"{name} is a {type(linear).__name__} of bitsandbytes, a class that is not supported")
    return QuantizedLinear(packed, linear.bias, compute_dtype).train(linear.training)


def remove_bitsandbytes_marks_(model: nn.Module) -> None:
    """Removes transformers' marks of a bitsandbytes model, which forbid `.to()` and would be saved with it."""
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        del model.config.quantization_config  # type: ignore[union-attr]
    for mark in ("hf_quantizer", "quantization_method"):
        if hasattr(model, mark):
            setattr(model, mark, None)
    for mark in ("is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit"):
        if getattr(model, mark, False):
            setattr(model, mark, False)
