"""Tests of tensors read back from GGUF files, in parts; all families are in test_families.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qlora_lite.export.gguf.library import GgufTensor, open_gguf, write_gguf
from qlora_lite.export.gguf.read_back import ReadBack
from qlora_lite.export.gguf.tensors import permuted_rows

VALUES = torch.randn(12, 64, generator=torch.Generator().manual_seed(3))


def stored(folder: Path, values: torch.Tensor, type: str) -> ReadBack:
    """A tensor of a file, as it is."""
    write_gguf(
        folder / "a.gguf", "llama", {}, [GgufTensor("output.weight", tuple(values.shape), type, lambda: [values])]
    )
    found = open_gguf(folder / "a.gguf")["output.weight"]
    assert found.shape == tuple(values.shape)
    return ReadBack("output.weight", found.shape, found)


@pytest.mark.parametrize(
    ("type", "error"), [("f32", 0.0), ("f16", 2e-3), ("bf16", 2e-2), ("q8_0", 2e-2), ("q4_0", 0.5)]
)
def test_rows_are_unpacked(tmp_path: Path, type: str, error: float) -> None:
    found = stored(tmp_path, VALUES, type)
    rows = found.rows(3, 7)
    assert rows.dtype == torch.float32 and rows.shape == (4, 64)
    assert float((rows - VALUES[3:7]).abs().max()) <= error
    assert torch.equal(found.select(5).rows(0, 64), found.rows(5, 6)[0])


def test_order_transposition_and_one_are_undone(tmp_path: Path) -> None:
    plain = stored(tmp_path, permuted_rows(VALUES, 3), "f32")
    order = permuted_rows(torch.arange(12), 3).argsort()
    turned = ReadBack("a", (12, 64), plain.stored, order)
    assert torch.equal(turned.rows(0, 12), VALUES) and torch.equal(turned.rows(5, 8), VALUES[5:8])
    plain = stored(tmp_path, VALUES.t().contiguous(), "f32")
    assert torch.equal(ReadBack("a", (12, 64), plain.stored, transposed=True).rows(2, 5), VALUES[2:5])
    square = VALUES[:, :12]
    plain = stored(tmp_path, square.t().contiguous(), "f32")
    assert torch.equal(ReadBack("a", (12, 12), plain.stored, transposed=True).rows(2, 5), square[2:5])
    plain = stored(tmp_path, VALUES[0] + 1, "f32")
    assert torch.equal(ReadBack("a", (64,), plain.stored, added=1.0).rows(1, 9), VALUES[0, 1:9] + 1 - 1)
    assert ReadBack("a", (1, 64), plain.stored).rows(0, 1).shape == (1, 64)


def test_matrices_of_a_stack(tmp_path: Path) -> None:
    stack = VALUES.view(3, 4, 64)
    found = stored(tmp_path, stack, "q8_0").stored
    assert found.matrix(2).shape == (4, 64)
    assert float((found.matrix(2).rows(1, 3) - stack[2, 1:3]).abs().max()) < 2e-2
