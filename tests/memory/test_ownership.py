from __future__ import annotations

import bitsandbytes
import pytest
import torch
from torch import Tensor, nn

from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.measure import MemoryProfiler
from qlora_lite.quantize import bnb

WIDTH, HEIGHT = 256, 128


def linear_4bit(nested: bool) -> nn.Module:
    layer = bitsandbytes.nn.Linear4bit(WIDTH, HEIGHT, bias=False, compress_statistics=nested, quant_type="nf4")
    return layer.to("cpu")


class Adapted(nn.Module):
    """y = W0 x + B A x, as peft has it around a layer of bitsandbytes."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(WIDTH, 4, bias=False), nn.Linear(4, HEIGHT, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.lora_B(self.lora_A(x))


def sizes_after_a_step(model: nn.Module) -> dict[tuple[Category, str | None], int]:
    """What is alive at the end of a step, of what the profiler says to know."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    with MemoryProfiler(model, optimizer) as profiler:
        with profiler.phase("step"):
            model(torch.ones(2, WIDTH)).sum().backward()
            optimizer.step()
        with profiler.phase("after"):
            pass
    found = profiler.report().phase("after")
    assert found is not None and found.breakdown is not None
    return dict(found.breakdown)


@pytest.mark.parametrize("nested", [False, True])
def test_weights_and_statistics_of_a_4bit_layer_of_bitsandbytes(nested: bool) -> None:
    model = Adapted(linear_4bit(nested))
    state = model.base.weight.quant_state
    statistics = state.absmax.nbytes + state.code.nbytes
    if nested:
        statistics += state.offset.nbytes + state.state2.absmax.nbytes + state.state2.code.nbytes
    adapters = {"lora_A": 4 * WIDTH * 4, "lora_B": 4 * HEIGHT * 4}
    expected = {(Category.BASE_WEIGHT, "base"): WIDTH * HEIGHT // 2, (Category.QUANT_STATE, "base"): statistics}
    for category in (Category.ADAPTER, Category.GRADIENT, Category.OPTIMIZER_STATE):
        expected |= {(category, name): size for name, size in adapters.items()}
    assert sizes_after_a_step(model) == expected


def test_weights_and_statistics_of_an_8bit_layer_of_bitsandbytes() -> None:
    layer = bitsandbytes.nn.Linear8bitLt(WIDTH, HEIGHT, bias=False, has_fp16_weights=False).to("cpu")
    layer(torch.ones(2, WIDTH))  # which moves codes and statistics from the weight to the layer's state
    found = sizes_after_a_step(Adapted(layer))
    assert found[Category.BASE_WEIGHT, "base"] == WIDTH * HEIGHT
    assert found[Category.QUANT_STATE, "base"] == 4 * HEIGHT


def test_states_of_an_8bit_optimizer_belong_to_their_layers() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, HEIGHT, bias=False))
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters())
    with MemoryProfiler(model, optimizer) as profiler, profiler.phase("step"):
        model(torch.ones(2, WIDTH)).sum().backward()
        optimizer.step()
    report = profiler.report().phase("step")
    assert report is not None and report.breakdown is not None
    blocks = WIDTH * HEIGHT // 256
    tables = 2 * bnb.create_dynamic_map().nbytes  # shared by all parameters, counted where they were met first
    assert report.breakdown[Category.OPTIMIZER_STATE, "0"] == 2 * (WIDTH * HEIGHT + 4 * blocks) + tables
