"""Tests of the writer: pieces give the bytes that the gguf package gives of wholes, with bounded errors."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from qlora_lite.errors import CheckpointError, ConfigError, QuantizationError
from qlora_lite.export.gguf import library
from qlora_lite.export.gguf.library import TYPES, GgufTensor, check_file, tensor_names, write_gguf

VALUES = torch.randn(12, 64, generator=torch.Generator().manual_seed(1)) * 3


def in_pieces(type: str, values: torch.Tensor = VALUES, rows: int = 5) -> GgufTensor:
    return GgufTensor("blk.0.ffn_up.weight", tuple(values.shape), type, lambda: values.split(rows))


@pytest.mark.parametrize("type", TYPES)
def test_pieces_have_the_bytes_of_wholes(tmp_path: Path, type: str) -> None:
    settings = {"name": "small", "block_count": 1}
    vector = GgufTensor("output_norm.weight", (3,), "f32", lambda: [torch.arange(3.0)])
    written = write_gguf(tmp_path / "a.gguf", "llama", settings, [in_pieces(type), vector], {"adapter.lora.alpha": 2.0})
    check_file(tmp_path / "a.gguf", written)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    first, second = reader.tensors
    whole = gguf.quantize(VALUES.numpy(), gguf.GGMLQuantizationType[type.upper()])
    assert first.data.tobytes() == whole.tobytes() and first.shape.tolist() == [64, 12]
    assert second.data.tolist() == [0.0, 1.0, 2.0]
    assert reader.fields["llama.block_count"].contents() == 1
    assert reader.fields["adapter.lora.alpha"].contents() == 2.0
    unpacked = gguf.dequantize(whole, gguf.GGMLQuantizationType[type.upper()])
    error = float(((unpacked - VALUES.numpy()).astype(np.float64) ** 2).sum())
    assert written[0].error == (pytest.approx(error) if type in library.PACKED else 0.0)


@pytest.mark.parametrize("type", library.PACKED)
def test_the_bound_of_errors_is_kept_and_close(type: str) -> None:
    """Random blocks of every scale, and the two ends of a block, stay within it; a smaller bound would be broken."""
    scales = torch.logspace(-9, 4, 400).unsqueeze(1)
    values = torch.randn(400, 32, generator=torch.Generator().manual_seed(2)) * scales
    values[:, 0], values[:, 1] = scales[:, 0] * 5, scales[:, 0] * -5
    _, unpacked = library._packed(values, in_pieces(type, values))
    share = (unpacked - values).abs().amax(1) / values.abs().amax(1)
    assert float(share[200:].max()) > 0.97 * (0.5 / 127 if type == "q8_0" else 1 / 8)


def test_values_that_a_type_cannot_hold_are_refused(tmp_path: Path) -> None:
    large = torch.full((1, 32), 1e5)
    with pytest.raises(QuantizationError, match=r"blk\.0\.ffn_up\.weight reaches 100000, above 65504"):
        write_gguf(tmp_path / "a.gguf", "llama", {}, [in_pieces("f16", large)])
    with pytest.raises(QuantizationError, match=r"blk\.0\.ffn_up\.weight has values that q8_0 cannot hold"):
        write_gguf(tmp_path / "b.gguf", "llama", {}, [in_pieces("q8_0", large * 1e3)])
    with pytest.raises(QuantizationError, match="holds NaN or infinity"):
        write_gguf(tmp_path / "c.gguf", "llama", {}, [in_pieces("q4_0", large * torch.nan)])


def test_pieces_that_are_not_as_planned_are_refused(tmp_path: Path) -> None:
    short = GgufTensor("blk.0.ffn_up.weight", (13, 64), "f16", lambda: [VALUES])
    with pytest.raises(CheckpointError, match="was planned as 1664 bytes; got 1536"):
        write_gguf(tmp_path / "a.gguf", "llama", {}, [short])


def test_a_file_that_changed_is_found(tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "a.gguf", "llama", {}, [in_pieces("q8_0")])
    content = bytearray((tmp_path / "a.gguf").read_bytes())
    content[-100] ^= 1
    (tmp_path / "a.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"was read back with another blk\.0\.ffn_up\.weight than was written"):
        check_file(tmp_path / "a.gguf", written)
    with pytest.raises(CheckpointError, match="was read back with other tensors"):
        check_file(tmp_path / "a.gguf", [])


def test_names_are_those_of_the_package() -> None:
    name = tensor_names("llama", 2)
    assert name("model.layers.1.self_attn.q_proj.bias") == "blk.1.attn_q.bias"
    assert name("model.layers.2.self_attn.q_proj.weight") is None


def test_without_the_package_a_sentence_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"needs the gguf package; run: pip install 'qlora-lite\[gguf\]'"):
        library.gguf()
