"""The names of a plain checkpoint, against the model that was packed and adapted."""

from __future__ import annotations

from pathlib import Path

import pytest

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized
from qlora_lite.errors import TargetError
from qlora_lite.plain_weights import plain_weights, weights_to_write


def test_packing_and_adapters_change_no_name(tiny_folder: Path) -> None:
    plain = load_quantized(tiny_folder, QuantConfig(format="none"))
    model = load_quantized(tiny_folder, QuantConfig(embedding_format="int8"))
    add_lora_(model, LoraConfig(rank=2))
    assert {weight.name for weight in plain_weights(model)} == plain.state_dict().keys()
    for weight in plain_weights(model):
        assert tuple(weight.holder.shape) == tuple(plain.state_dict()[weight.name].shape)
        assert (weight.delta is not None) == weight.name.endswith("proj.weight")


def test_tied_weights_are_written_once_and_not_adapted_apart(tiny_folder: Path) -> None:
    model = load_quantized(tiny_folder)
    written = [weight.name for weight in weights_to_write(model)]
    assert "model.embed_tokens.weight" in written and "lm_head.weight" not in written
    add_lora_(model, LoraConfig(rank=2, target_modules=["embed_tokens"]))
    with pytest.raises(TargetError, match="are one weight"):
        weights_to_write(model)
