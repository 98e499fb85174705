"""Tests of the faster search for 4-bit codes against bitsandbytes, code for code."""

from __future__ import annotations

import bitsandbytes.functional as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lite.quantization.pack_4bit import UNDECIDED, code_tables, pack_4bit


def code_of(format: str) -> tuple[float, ...]:
    return tuple(bnb.get_4bit_type(format, device="cpu").tolist())


def check_equal(values: torch.Tensor, blocksize: int, format: str) -> None:
    codes, absmax = torch.ops.bitsandbytes.quantize_4bit(values, blocksize, format, torch.uint8)
    ours, our_absmax = pack_4bit(values, blocksize, code_of(format))
    assert torch.equal(ours, codes.view(-1)) and torch.equal(our_absmax, absmax)


@settings(max_examples=60)
@given(
    st.integers(0, 2**31),
    st.sampled_from([64, 128, 1024, 4096]),
    st.sampled_from(["nf4", "fp4"]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
)
def test_codes_are_bitsandbytes(seed: int, blocksize: int, format: str, dtype: torch.dtype, scale: float) -> None:
    values = torch.randn(8 * blocksize, generator=torch.Generator().manual_seed(seed)).mul_(scale).to(dtype)
    values[:blocksize] = 0
    check_equal(values, blocksize, format)


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_codes_are_bitsandbytes_around_every_midpoint_and_border(format: str) -> None:
    tables = code_tables(code_of(format))
    borders = torch.arange(2 * tables.cells + 1, dtype=torch.float64).div_(tables.cells).sub_(1).float()
    near = torch.cat([tables.midpoint[tables.code >= UNDECIDED], borders])
    steps = [near]
    for direction in (2.0, -2.0):
        step = near
        for _ in range(4):
            step = torch.nextafter(step, torch.full_like(step, direction))
            steps.append(step)
    values = torch.cat(steps).clamp_(-1, 1)
    # The first of each block is 1, so that nothing is scaled.
    blocks = torch.ones(-(-values.numel() // 63), 64)
    padded = torch.nn.functional.pad(values, (0, blocks.shape[0] * 63 - values.numel()))
    blocks[:, 1:] = padded.view(-1, 63)
    check_equal(blocks.view(-1), 64, format)
