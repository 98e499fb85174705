"""Tests of the bytes on disk against those of a model that was really packed to disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized
from qlora_lite.offload.base_bytes import BaseBytes
from qlora_lite.offload.disk_source import disk_source


@pytest.fixture(scope="module")
def folders(make_tiny_model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    return {layers: make_tiny_model(tmp_path_factory.mktemp(f"{layers}"), layers, 512) for layers in (2, 3, 5)}


@pytest.mark.parametrize(
    "config", [QuantConfig(), QuantConfig("int8", embedding_format="int8"), QuantConfig(double_quant=False)]
)
def test_they_are_those_of_the_packed_file(
    folders: dict[int, Path], config: QuantConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QLORA_LITE_CACHE", str(tmp_path))
    model = load_quantized(folders[2], config, base="disk")
    add_lora_(model, LoraConfig(rank=2))
    source, found = disk_source(model), BaseBytes.of(model)
    assert source is not None and sum(source.block_bytes) > 1 << 20
    assert (found.total, found.outside) == (sum(source.block_bytes) + source.outside_bytes, source.outside_bytes)
    assert found.largest_block == max(source.block_bytes) and found.by_rows == 0  # embedding and head are tied
    assert found.read_a_batch == 2 * sum(source.block_bytes) + source.outside_bytes


def test_layers_are_added_in_a_straight_line(folders: dict[int, Path]) -> None:
    two, three, five = (BaseBytes.of(load_quantized(folders[layers], QuantConfig())) for layers in (2, 3, 5))
    assert two.with_more_layers(three, 3) == five
    assert five.resident == 2 * five.largest_block < five.total
