"""Tests of the formulas of kernel workspaces with numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qlora_lite.memory.breakdown import Category
from qlora_lite.memory.trace import StorageTrace
from qlora_lite.planning.cuda_workspaces import CUBLAS_WORKSPACE, persistent_workspace_bytes, transient_workspace_bytes

aten = torch.ops.aten
FLASH_BACKWARD = aten._scaled_dot_product_flash_attention_for_cpu_backward.default
ON_AN_A100 = 8_519_680  # 8,320 KiB


def heads(batch: int, count: int, tokens: int, width: int) -> torch.Tensor:
    return torch.empty(batch, count, tokens, width, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("shape", "keys", "size"),
    [
        # 2 x 4 x 128 rows of 64 + 1 numbers
        ((2, 4, 128, 64), 4, 2 * 4 * 128 * 65 * 4),
        # 130 rows are 256, a width of 40 is 64
        ((1, 4, 130, 40), 4, 4 * 256 * 65 * 4),
        # keys for two heads: dk and dv once more, for four heads, in bf16
        ((1, 4, 128, 32), 2, 4 * 128 * 33 * 4 + 2 * 4 * 128 * 32 * 2),
        # above 192 all widths are 256
        ((1, 1, 128, 200), 1, 128 * 257 * 4),
    ],
)
def test_flash_attention_sums_in_fp32(shape: tuple[int, int, int, int], keys: int, size: int) -> None:
    batch, _, tokens, width = shape
    query, key = heads(*shape), heads(batch, keys, tokens, width)
    assert transient_workspace_bytes(FLASH_BACKWARD, (query, query, key, key, query, torch.empty(1))) == size


@pytest.mark.parametrize(("blocks", "statistics"), [(64, 0), (1, 64 * 4)])
def test_a_product_with_4_bits_unpacks_the_weight(blocks: int, statistics: int) -> None:
    rows, packed = torch.empty(3, 64, dtype=torch.bfloat16), torch.empty(2048, 1, dtype=torch.uint8)
    gemm = torch.ops.bitsandbytes.gemm_4bit.default
    size = transient_workspace_bytes(gemm, (rows, packed, [64, 64], torch.empty(blocks), 64, "nf4"))
    assert size == 64 * 64 * 2 + statistics


def test_other_operators_have_no_workspaces() -> None:
    for operator in (aten.add.Tensor, aten.clone.default, aten._to_copy.default):
        assert transient_workspace_bytes(operator, (torch.ones(2),)) == persistent_workspace_bytes(operator) == 0
    assert transient_workspace_bytes(aten.mm.default, (torch.ones(2, 2), torch.ones(2, 2))) == 0


def test_each_thread_keeps_one_workspace_from_its_first_product_on() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    trace = StorageTrace(persistent_workspace_bytes=persistent_workspace_bytes)
    trace.track_modules(model)
    with trace:
        with trace.phase("before"):
            x = torch.ones(2, 4) + 1
        for _ in range(2):
            with trace.phase("forward"):
                loss = model(x).sum()
            with trace.phase("backward"):
                loss.backward()
    assert CUBLAS_WORKSPACE == ON_AN_A100
    kept = [(event.phase, event.delta) for event in trace.timeline() if abs(event.delta) == CUBLAS_WORKSPACE]
    assert kept == [("forward", CUBLAS_WORKSPACE), ("backward", CUBLAS_WORKSPACE)]
    assert trace.peak("before")[0] < CUBLAS_WORKSPACE
    assert trace.peak()[1][Category.OTHER, None] >= 2 * CUBLAS_WORKSPACE
