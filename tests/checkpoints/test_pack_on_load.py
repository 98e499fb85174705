"""Tests of packing weights from slices of a file against packing them whole."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from qlora_lite import QuantConfig
from qlora_lite.checkpoints import pack_on_load
from qlora_lite.checkpoints.pack_on_load import PackedOnLoad
from qlora_lite.checkpoints.safetensors_read import StoredTensor, stored_tensors
from qlora_lite.compute.slicing import slices_within
from qlora_lite.errors import QuantizationError
from qlora_lite.export.weight_rows import (
    PackedRows,
    RepackedRows,
)
from qlora_lite.quantization.packed_weight import PackedWeight


def stored(folder: Path, tensor: torch.Tensor) -> StoredTensor:
    save_file({"w": tensor}, folder / "w.safetensors")
    return stored_tensors(folder / "w.safetensors")["w"]


@pytest.mark.parametrize("format", ["nf4", "fp4", "int8"])
@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("shape", [(70, 64), (33, 40), (300, 96)])
def test_packed_from_slices_of_a_file_it_is_packed_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, double_quant: bool, shape: tuple[int, int]
) -> None:
    weight = torch.randn(shape)
    config = QuantConfig(format=format, double_quant=double_quant)
    monkeypatch.setattr(pack_on_load, "READ_BYTES", 1)  # the least that the format allows at once
    source = PackedOnLoad(stored(tmp_path, weight), config, format, torch.bfloat16)
    ours, whole = source.load(torch.device("cpu")), PackedWeight.of(weight.bfloat16(), config)
    assert ours.state_dict().keys() == whole.state_dict().keys()
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in ours.state_dict().items())
    values = whole.dequantize(torch.float32)
    for rows in (RepackedRows(source), PackedRows(whole)):
        parts = slices_within(rows.shape, torch.float32.itemsize, 1, rows.step)
        pieces = [rows.rows(part.start, part.stop) for part in parts]
        assert torch.equal(torch.cat(pieces), values) and (len(pieces) > 1 or rows.step >= shape[0])


def test_what_cannot_be_packed_is_named_with_its_place_in_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(64, 64)
    weight[40, 2] = torch.nan
    monkeypatch.setattr(pack_on_load, "READ_BYTES", 1)
    source = PackedOnLoad(stored(tmp_path, weight), QuantConfig(), "nf4", torch.float32)
    with pytest.raises(QuantizationError, match=r"w holds nan at index \(40, 2\)"):
        source.load(torch.device("cpu"))
