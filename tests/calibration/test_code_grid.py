"""Tests of what a block can hold: absmax that are stored are those that are unpacked, of either sign."""

from __future__ import annotations

import pytest
import torch

from qlora_lite.calibration.code_grid import AbsmaxGrid, CodeGrid, store_codes_
from qlora_lite.quantization.kernels import block_absmax, code_values
from qlora_lite.quantization.packed_weight import PackedWeight


@pytest.mark.parametrize("format", ["nf4", "fp4"])
def test_the_nearest_value_has_the_index_of_the_format(format: str) -> None:
    grid, table = CodeGrid.of(format, torch.zeros(1)), torch.tensor(code_values(format))
    order = table.sort()[0]
    midpoints = (order[1:] + order[:-1]) / 2
    edges = torch.arange(1025) / 512 - 1
    near = [value + step for value in (midpoints, edges) for step in (-1e-6, 1e-6)]
    values = torch.cat([torch.randn(1000), *near])[None].repeat(2, 1)
    places = grid.places(values)
    found = table[grid.indices[places.long()].long()]
    assert torch.equal(found, grid.at(places))
    assert torch.equal((found - values).abs(), (values.unsqueeze(-1) - table).abs().amin(-1))
    assert grid.is_symmetric == (format == "fp4")


@pytest.mark.parametrize("double_quant", [True, False])
def test_an_absmax_that_was_rounded_is_unpacked_as_it_is(double_quant: bool) -> None:
    """700 blocks, of three groups, half of them negative; one group is all zeros."""
    rows, blocks = 100, 7
    absmax = torch.rand(rows, blocks) + 0.2
    absmax.view(-1)[256:512] = 0
    grid = AbsmaxGrid.of(absmax, double_quant)
    signed = absmax * torch.randn(rows, blocks).sign() * 1.2
    chosen = torch.stack([grid.rounded(signed[:, block], block) for block in range(blocks)], 1)
    packed = PackedWeight((rows, blocks * 64), "nf4", 64, double_quant)
    grid.store_(chosen, packed)
    assert torch.equal(block_absmax(packed, 0, rows * blocks).view(rows, blocks), chosen)
    # Steps of the nested values are at most 1/70 of the largest of a group.
    assert (chosen - signed).abs().max() <= (0.01 * 1.25 * 1.2 if double_quant else 0)


def test_a_slice_of_rows_has_its_own_groups() -> None:
    absmax = torch.rand(80, 9) + 0.1
    grid = AbsmaxGrid.of(absmax, True)
    wanted = absmax[:, 4] * -0.9
    assert torch.equal(grid.of_rows(slice(30, 60)).rounded(wanted[30:60], 4), grid.rounded(wanted, 4)[30:60])


def test_codes_are_stored_as_bitsandbytes_stores_them() -> None:
    weight = torch.randn(6, 64)
    packed = PackedWeight((6, 64), "nf4", 64, False)
    packed.absmax.copy_(torch.ones(6))
    indices = torch.randint(0, 16, (6, 64), dtype=torch.uint8)
    store_codes_(indices, packed)
    assert torch.equal(packed.dequantize(weight.dtype), torch.tensor(code_values("nf4"))[indices.long()])
