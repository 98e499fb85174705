"""Tests of the number of positions that a model has, against what transformers computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qlora_lite import LoraConfig, add_lora_
from qlora_lite.positions import longest_sequence, most_positions

DECODER = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 48}
BERT = {"is_decoder": True}
MPT = {"d_model": 32, "n_heads": 2, "n_layers": 1, "expansion_ratio": 1}
STATE_SPACE = {"state_size": 8, "time_step_rank": 4}
# Config class, its sizes, and the tokens that transformers takes at most.
WITH_TABLE: list[tuple[str, dict[str, Any], int]] = [
    ("GPT2Config", {"n_positions": 20}, 20),
    ("OPTConfig", {"max_position_embeddings": 20, "ffn_dim": 48, "word_embed_proj_dim": 32}, 20),  # two rows more
    ("BartConfig", {"max_position_embeddings": 20, **DECODER}, 20),  # two rows more
    ("WhisperConfig", {"max_target_positions": 20, **DECODER}, 20),
    ("BertConfig", {"max_position_embeddings": 20, **BERT}, 20),
    ("RobertaConfig", {"max_position_embeddings": 20, **BERT}, 19),  # its positions are counted from 1
    ("RobertaConfig", {"max_position_embeddings": 20, "pad_token_id": 1, **BERT}, 18),
    ("GPTJConfig", {"n_positions": 20, "n_embd": 32, "n_head": 2, "n_layer": 1, "rotary_dim": 4}, 20),
    ("CTRLConfig", {"n_positions": 20, "n_embd": 32, "n_head": 2, "n_layer": 1, "dff": 48}, 20),
    ("MptConfig", {"max_seq_len": 20, **MPT}, 20),
]
WITHOUT_TABLE: list[tuple[str, dict[str, Any]]] = [
    ("LlamaConfig", {"max_position_embeddings": 20}),
    ("GPTNeoXConfig", {"max_position_embeddings": 20}),
    (
        "XGLMConfig",
        {"max_position_embeddings": 20, "d_model": 32, "num_layers": 1, "attention_heads": 2, "ffn_dim": 48},
    ),
    ("MambaConfig", STATE_SPACE),
    ("BloomConfig", {}),
]


def computed(model: Any, tokens: int) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.arange(3, 3 + tokens).view(1, tokens), use_cache=False).logits
    return logits


@pytest.mark.parametrize(("family", "sizes", "most"), WITH_TABLE)
def test_a_table_holds_as_many_positions_as_transformers_takes(
    small_model: Callable[..., Any], family: str, sizes: dict[str, Any], most: int
) -> None:
    model = small_model(family, **sizes)
    assert most_positions(model) == most and longest_sequence(model.config) == 20
    assert computed(model, most).isfinite().all()
    with pytest.raises((IndexError, RuntimeError)):
        computed(model, most + 1)


@pytest.mark.parametrize(("family", "sizes"), WITHOUT_TABLE)
def test_models_without_a_table_take_longer_rows_than_they_were_made_for(
    small_model: Callable[..., Any], family: str, sizes: dict[str, Any]
) -> None:
    model = small_model(family, **sizes)
    assert most_positions(model) is None and longest_sequence(model.config) == sizes.get("max_position_embeddings")
    assert computed(model, 30).isfinite().all()


def test_the_table_of_another_part_does_not_count(small_model: Callable[..., Any]) -> None:
    model = small_model("LlamaConfig", max_position_embeddings=20)
    model.patches = torch.nn.ModuleDict({"position_embedding": torch.nn.Embedding(9, 4)})
    model.vision_tower = torch.nn.ModuleDict({"position_embedding": torch.nn.Embedding(20, 4)})
    assert most_positions(model) is None
    model.patches["position_embedding"] = torch.nn.Embedding(20, 4)
    assert most_positions(model) == 20


def test_an_adapted_table_counts_too(small_model: Callable[..., Any]) -> None:
    model = small_model("GPT2Config", n_positions=20)
    add_lora_(model, LoraConfig(target_modules=["wpe"], rank=2))
    assert most_positions(model) == 20


def test_models_of_another_origin_have_no_limit() -> None:
    assert most_positions(torch.nn.Linear(2, 2)) is None and longest_sequence(None) is None


def test_the_length_is_found_in_the_part_for_text() -> None:
    from transformers import Gemma3Config, Qwen2Config

    assert longest_sequence(Qwen2Config(max_position_embeddings=77)) == 77
    assert longest_sequence(Gemma3Config(text_config={"max_position_embeddings": 78})) == 78
