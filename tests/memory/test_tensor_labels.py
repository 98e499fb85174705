"""Tests of labelling the tensors of layers, those of this library and of bitsandbytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from qlora_lite.memory.breakdown import Category, MemoryBreakdown
from qlora_lite.memory.profiler import MemoryProfiler
from qlora_lite.memory.tensor_labels import TensorLabeler
from qlora_lite.memory.trace import StorageTrace
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.formats import packed_bytes, statistics_bytes
from qlora_lite.quantization.kernels import bnb, import_bitsandbytes
from qlora_lite.quantization.layers import QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight

OUT, IN = 96, 128
FLOAT = 4
CODE_4BIT = 16 * FLOAT  # the values of the codes, which bitsandbytes keeps with the statistics of each weight


def theirs(format: str, double_quant: bool) -> nn.Module:
    bnb = import_bitsandbytes("bitsandbytes.nn")
    if format == "int8":
        layer: Any = bnb.Linear8bitLt(IN, OUT, bias=True, has_fp16_weights=False)
    else:
        layer = bnb.Linear4bit(IN, OUT, bias=True, quant_type=format, compress_statistics=double_quant)
    weight = layer.weight
    layer.weight = type(weight)(torch.randn(OUT, IN), requires_grad=False, **weight.__dict__).to("cpu")
    return layer.requires_grad_(False)


def labelled(model: nn.Module, *also: Any) -> MemoryBreakdown:
    labeler, trace = TensorLabeler(), StorageTrace()
    labeler.track(model, *also)
    with trace:
        labeler.label(trace)
    labeler.remove_hooks()
    return trace.peak()[1]


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("double_quant", [False, True])
def test_packed_layers_of_bitsandbytes_are_weights_and_statistics(format: str, double_quant: bool) -> None:
    held = labelled(nn.ModuleDict({"layer": theirs(format, double_quant)}))
    assert held[Category.BASE_WEIGHT, "layer"] == packed_bytes((OUT, IN), format) + OUT * FLOAT
    table = 0 if format == "int8" else CODE_4BIT
    assert held[Category.QUANT_STATE, "layer"] == statistics_bytes((OUT, IN), format, 64, double_quant) + table
    assert set(held) == {(Category.BASE_WEIGHT, "layer"), (Category.QUANT_STATE, "layer")}


def test_after_a_step_with_bitsandbytes_every_tensor_of_the_layer_is_labelled() -> None:
    layer = theirs("int8", False).train()
    layer(torch.randn(2, IN, requires_grad=True)).sum().backward()
    held = labelled(layer).by_category()
    assert held[Category.BASE_WEIGHT] == packed_bytes((OUT, IN), "int8") + OUT * FLOAT
    assert held[Category.QUANT_STATE] == OUT * FLOAT
    assert sum(held.values()) == held[Category.BASE_WEIGHT] + held[Category.QUANT_STATE]


def test_gradients_and_states_belong_to_the_layer_of_their_parameter() -> None:
    base = QuantizedLinear(PackedWeight.of(torch.randn(OUT, IN), QuantConfig()))
    model = nn.ModuleDict({"base": base, "trained": nn.Linear(IN, 4, bias=False)})
    optimizer = torch.optim.AdamW(model["trained"].parameters())
    model["trained"](torch.ones(1, IN)).sum().backward()
    optimizer.step()
    held, size = labelled(model, optimizer), 4 * IN * FLOAT
    assert held[Category.ADAPTER, "trained"] == held[Category.GRADIENT, "trained"] == size
    assert held[Category.OPTIMIZER_STATE, "trained"] == 2 * size + FLOAT
    assert held[Category.QUANT_STATE, "base"] == statistics_bytes((OUT, IN), "nf4", 64, True)
    assert not model["trained"].weight._post_accumulate_grad_hooks


def test_states_of_an_8bit_optimizer_belong_to_their_layers() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False))
    optimizer = import_bitsandbytes("bitsandbytes.optim").AdamW8bit(model.parameters())
    with MemoryProfiler(model, optimizer) as profiler, profiler.phase("step"):
        model(torch.ones(2, IN)).sum().backward()
        optimizer.step()
    report = profiler.report().phase("step")
    assert report is not None and report.breakdown is not None
    blocks = IN * OUT // 256
    tables = 2 * bnb.create_dynamic_map().nbytes  # shared by all parameters, counted where they were met first
    assert report.breakdown[Category.OPTIMIZER_STATE, "0"] == 2 * (IN * OUT + 4 * blocks) + tables
