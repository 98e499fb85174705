"""Tests of the bytes of a base in shares. test_base.py compares them with what processes receive."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_lite import LoraConfig, QuantConfig, load_quantized
from qlora_lite.errors import ConfigError
from qlora_lite.planning.memory_budget import base_in_shares
from qlora_lite.planning.training_rehearsal import read_config
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.sharding.count import shares_of_model


@pytest.mark.parametrize("embedding_format", ["none", "int8"])
def test_a_config_gives_the_bytes_of_the_model(tiny_folder: Path, embedding_format: str) -> None:
    quant = QuantConfig(embedding_format=embedding_format)
    planned = base_in_shares(read_config(tiny_folder), quant, LoraConfig(rank=2), 4)
    model = load_quantized(tiny_folder, quant)
    assert planned == shares_of_model(model, 4)
    weights = [module for module in model.modules() if isinstance(module, PackedWeight)]
    nested = sum(4 + 1024 for weight in weights if weight.double_quant)  # offset and table are whole in each process
    packed = sum(weight.storage_bytes() for weight in weights) - nested
    plain = 0 if embedding_format == "int8" else model.get_input_embeddings().weight.nbytes
    assert planned.whole == packed + plain
    units = 2 + 1  # two layers, and an embedding that is the head too
    assert 0 <= 4 * planned.share - planned.whole <= units * 4 * 64 + 3 * 64 * len(weights)
    # Each unit comes twice: the blocks in both passes, the embedding in two places.
    assert planned.received == 2 * 3 * planned.share
    assert planned.gathered <= planned.whole + 4 * 64 * 2 + 3 * 64 * len(weights)
    assert planned.saved == planned.whole - planned.share - planned.gathered


def test_one_process_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match="at least 2 processes; got 1"):
        base_in_shares(read_config(tiny_folder), QuantConfig(), LoraConfig(rank=2), 1)
