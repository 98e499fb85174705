"""Tests of the names and weights of a plain checkpoint, recovered from a packed and adapted model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized
from qlora_lite.export.plain_weights import plain_weights, weights_to_write


def test_packing_and_adapters_change_no_name(tiny_folder: Path) -> None:
    plain = load_quantized(tiny_folder, QuantConfig(format="none"))
    model = load_quantized(tiny_folder, QuantConfig(embedding_format="int8"))
    add_lora_(model, LoraConfig(rank=2))
    assert {weight.name for weight in plain_weights(model)} == plain.state_dict().keys()
    for weight in plain_weights(model):
        assert tuple(weight.holder.shape) == tuple(plain.state_dict()[weight.name].shape)
        assert (weight.delta is not None) == weight.name.endswith("proj.weight")


def test_tied_weights_are_written_once_or_apart_if_one_is_adapted(tiny_folder: Path) -> None:
    model = load_quantized(tiny_folder)
    weights, untied = weights_to_write(model)
    written = [weight.name for weight in weights]
    assert not untied and "model.embed_tokens.weight" in written and "lm_head.weight" not in written
    add_lora_(model, LoraConfig(rank=2, target_modules=["embed_tokens"]))
    weights, untied = weights_to_write(model)
    by_name = {weight.name: weight for weight in weights}
    embedding, head = by_name["model.embed_tokens.weight"], by_name["lm_head.weight"]
    assert untied and embedding.holder is head.holder
    assert embedding.delta is not None and head.delta is None
    assert head.name_in({"model.embed_tokens.weight"}) == "model.embed_tokens.weight" and head.name_in(()) is None


def test_of_tied_weights_the_one_that_is_no_alias_is_written(small_model: Callable[..., Any]) -> None:
    from qlora_lite.architecture import tied_names

    model = small_model("XLMRobertaConfig", is_decoder=True, tie_word_embeddings=True)
    held = [weight.name for weight in plain_weights(model)]
    kept, _ = weights_to_write(model)
    assert set(held) - {weight.name for weight in kept} == tied_names(model)
    embedding = next(weight for weight in kept if weight.name.endswith("word_embeddings.weight"))
    assert embedding.name_in({"lm_head.decoder.weight"}) == "lm_head.decoder.weight"
