"""Tests of adding a format as one row of `FORMATS`: it is packed, trained, saved, merged and planned."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import typer
from torch import Tensor

from qlora_lite import (
    LoraConfig,
    QuantConfig,
    TrainConfig,
    add_lora_,
    export_merged,
    load_quantized,
    merge_lora_,
    train,
)
from qlora_lite.cli.main import app
from qlora_lite.cli.quantize import quantize
from qlora_lite.compute.slicing import row_slices
from qlora_lite.errors import ConfigError, QuantizationError
from qlora_lite.export import save_quantized
from qlora_lite.planning.forecast import TrainingSetup
from qlora_lite.planning.memory_plan import DeviceMemory, plan
from qlora_lite.planning.training_rehearsal import read_config, rehearse_steps
from qlora_lite.quantization.formats import FORMATS, Format, storage_bytes
from qlora_lite.quantization.kernels import CHUNK_VALUES, Kernels, PackedBuffers, Slices
from qlora_lite.quantization.layers import QuantizedEmbedding
from qlora_lite.quantization.layouts import BLOCKS, ROWS
from qlora_lite.quantization.packed_weight import PackedWeight

GRID = tuple(n / 8 for n in range(-7, 9))
TOKENS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": TOKENS, "labels": TOKENS}


def pack_grid(into: PackedBuffers, slices: Slices) -> None:
    """The nearest of 16 equally spaced values, times the absmax of the block."""
    for first, rows in slices:
        flat, start = rows.reshape(-1).float(), first * into.shape[1]
        for part in row_slices(flat.numel(), CHUNK_VALUES, flat):
            values = flat[part]
            blocks = -(-values.numel() // into.blocksize)
            padded = torch.zeros(blocks * into.blocksize)
            padded[: values.numel()] = values
            padded = padded.view(blocks, -1)
            absmax = padded.abs().amax(1)
            codes = (padded / absmax.clamp(min=1e-38)[:, None] * 8).round_().clamp_(-7, 8).add_(7).to(torch.uint8)
            pairs = codes.view(-1, 2)
            packed = (pairs[:, 0] << 4 | pairs[:, 1])[: (values.numel() + 1) // 2]
            place, block = (start + part.start) // 2, (start + part.start) // into.blocksize
            into.packed[place : place + packed.numel()] = packed
            into.absmax[block : block + blocks] = absmax


def unpack_grid(packed: PackedBuffers, dtype: torch.dtype, first: int, last: int) -> Tensor:
    columns = packed.shape[1]
    start, stop = first * columns, last * columns
    pairs = packed.packed[start // 2 : (stop + 1) // 2]
    codes = torch.stack((pairs >> 4, pairs & 15), 1).view(-1)[: stop - start]
    absmax = packed.absmax[start // packed.blocksize :].repeat_interleave(packed.blocksize)[: stop - start]
    return (torch.tensor(GRID)[codes.int()] * absmax).view(last - first, columns).to(dtype)


def pack_coarse(into: PackedBuffers, slices: Slices) -> None:
    """Integers from -100 to 100, times the absmax of the row over 100."""
    for first, rows in slices:
        absmax = rows.float().abs().amax(1)
        into.packed[first : first + len(rows)] = (rows.float() * (100 / absmax.clamp(min=1e-38))[:, None]).round()
        into.absmax[first : first + len(rows)] = absmax


def unpack_coarse(packed: PackedBuffers, dtype: torch.dtype, first: int, last: int) -> Tensor:
    return (packed.packed[first:last] * (packed.absmax[first:last, None] / 100)).to(dtype)


def select_coarse(packed: PackedBuffers, numbers: Tensor) -> Tensor:
    return packed.packed[numbers] * (packed.absmax[numbers, None] / 100)


GRID_KERNELS = Kernels(pack_grid, unpack_grid, code_values=lambda format: GRID)
COARSE_KERNELS = Kernels(pack_coarse, unpack_coarse, select_rows=select_coarse)
GRID_ROW = Format("grid4", "4-bit grid", 4, BLOCKS, lambda: GRID_KERNELS, bitsandbytes="4bit")
COARSE_ROW = Format("coarse8", "coarse 8-bit integers", 8, ROWS, lambda: COARSE_KERNELS, holds_embeddings=True)


@pytest.fixture(params=[GRID_ROW, COARSE_ROW], ids=lambda row: row.name)
def row(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Format:
    for added in (GRID_ROW, COARSE_ROW):
        monkeypatch.setitem(FORMATS, added.name, added)
    added = request.param
    assert isinstance(added, Format)
    return added


def config_of(row: Format) -> QuantConfig:
    return QuantConfig(row.name, embedding_format=row.name if row.holds_embeddings else "none")


def test_a_weight_is_packed_by_the_row(row: Format) -> None:
    weight = torch.randn(33, 65)
    packed = PackedWeight.of(weight, config_of(row))
    held = sum(buffer.nbytes for buffer in packed.buffers())
    assert held == packed.storage_bytes() == storage_bytes((33, 65), row.name)
    assert not packed.double_quant
    error = (packed.dequantize(torch.float32) - weight).abs().max() / weight.abs().max()
    assert 0 < error <= (1 / 8 if row.bits == 4 else 1 / 200)
    step = packed.row_step
    if step < 33:
        assert torch.equal(packed.dequantize_rows(step, 33, torch.float32), packed.dequantize(torch.float32)[step:])


def test_a_model_is_trained_merged_and_exported(row: Format, tiny_folder: Path, tmp_path: Path) -> None:
    model = load_quantized(tiny_folder, config_of(row), dtype=torch.float32)
    assert isinstance(model.get_input_embeddings(), QuantizedEmbedding) == row.holds_embeddings
    add_lora_(model, LoraConfig(rank=2))
    result = train(model, [BATCH], TrainConfig(steps=3, learning_rate=1e-3), progress=False)
    assert result.losses[-1] < result.losses[0]
    trained = model(TOKENS).logits
    merge_lora_(model)
    torch.testing.assert_close(model(TOKENS).logits, trained, rtol=1e-3, atol=1e-3)
    export_merged(model, tmp_path / "merged", dtype=torch.float32)
    plain = load_quantized(tmp_path / "merged", QuantConfig(format="none"), dtype=torch.float32)
    torch.testing.assert_close(plain(TOKENS).logits, trained, rtol=1e-3, atol=1e-3)


def test_files_hold_it_if_the_row_says_so(row: Format, tiny_folder: Path, tmp_path: Path) -> None:
    model = load_quantized(tiny_folder, config_of(row), dtype=torch.float32)
    if row.bitsandbytes is None:
        with pytest.raises(ConfigError, match="bitsandbytes has no names for weights in coarse8; export_merged"):
            save_quantized(model, tmp_path / "packed")
        context = typer.Context(typer.main.get_command(app))
        for settings, refused in (
            ({"format": "coarse8"}, "format"),
            ({"embedding_format": "coarse8"}, "embedding_for"),
        ):
            with pytest.raises(ConfigError, match=rf"the {refused}.* of a packed checkpoint must be .*; got 'coarse8'"):
                quantize(
                    context, model="/nowhere", output=tmp_path / "packed", **settings
                )  # before the model is looked for
        return
    save_quantized(model, tmp_path / "packed")
    again = load_quantized(tmp_path / "packed", dtype=torch.float32)
    assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)
    stored = {name for name in again.state_dict() if name.endswith("packed")}
    assert stored and all(torch.equal(again.state_dict()[name], model.state_dict()[name]) for name in stored)


def test_memory_is_planned(row: Format, tiny_folder: Path) -> None:
    quant, lora = config_of(row), LoraConfig(rank=2)
    report = rehearse_steps(tiny_folder, quant, lora, TrainConfig(steps=2), rows=1, tokens=16)
    assert max(phase.live_peak or 0 for phase in report.phases) > 0
    if row.bits == 8:
        setup = TrainingSetup(quant, lora, 1, 16)
        decided = plan(read_config(tiny_folder), setup, DeviceMemory(1 << 33, 0, False), lengths=())
        offered = [alternative.change for alternative in decided.alternatives]
        assert decided.fits and "nf4 in place of coarse8" in offered


def test_what_the_row_denies_is_refused(row: Format) -> None:
    with pytest.raises(ConfigError, match=f"int8_activations need format int8; got '{row.name}'"):
        QuantConfig(row.name, int8_activations=True)
    if not row.holds_embeddings:
        with pytest.raises(ConfigError, match="embedding_format must be int8, coarse8 or none; got 'grid4'"):
            QuantConfig(embedding_format=row.name)
        packed = PackedWeight.of(torch.randn(8, 64), QuantConfig(row.name))
        with pytest.raises(QuantizationError, match="as int8 or coarse8; got grid4"):
            QuantizedEmbedding(packed, torch.float32)
        with pytest.raises(QuantizationError, match="rows can be selected from a weight in format int8 or coarse8"):
            packed.rows(torch.tensor([1]), torch.float32)


def test_the_row_is_gone_after_the_test() -> None:
    assert not {GRID_ROW.name, COARSE_ROW.name} & FORMATS.keys()
