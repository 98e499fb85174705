"""Tests of the check that tokens do not see later ones."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qlora_lite.errors import ConfigError
from qlora_lite.planning.rehearsal import fake_tensors
from qlora_lite.training.objective.causality import check_causality

BATCH = {"input_ids": torch.zeros(2, 4, dtype=torch.int64)}
XLNET = {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 48}
XLM = {"emb_dim": 32, "n_layers": 1, "n_heads": 2, "n_words": 64}
REFORMER = {
    "is_decoder": True,
    "axial_pos_embds_dim": [16, 16],
    "axial_pos_shape": [8, 8],
    "feed_forward_size": 48,
    "attn_layers": ["local", "lsh"],
    "local_attn_chunk_length": 4,
    "lsh_attn_chunk_length": 4,
    "num_buckets": 4,
}


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("LlamaConfig", {}),
        ("GPT2Config", {"n_positions": 7}),
        ("BertConfig", {"is_decoder": True}),
        ("XLNetConfig", {**XLNET, "attn_type": "uni"}),
        ("XLMConfig", {**XLM, "causal": True}),
        ("Gemma3TextConfig", {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}),
        ("MambaConfig", {}),
        ("Lfm2Config", {"layer_types": ["conv", "full_attention"], "dtype": torch.bfloat16}),
        ("ReformerConfig", {**REFORMER, "hash_seed": 0}),  # all tokens decide on its buckets
        ("MixtralConfig", {"num_local_experts": 8, "hidden_size": 64}),
        # Rounding changes its outputs in one row, and not with the tokens of the other one.
        ("MiniMaxM2Config", {"rotary_dim": 8, "attn_implementation": "eager"}),
        ("Llama4TextConfig", {"intermediate_size_mlp": 48}),  # it names its base by another word
    ],
)
def test_causal_models_are_trained(small_model: Callable[..., Any], family: str, sizes: dict[str, Any]) -> None:
    check_causality(small_model(family, **sizes), BATCH)


@pytest.mark.parametrize(
    ("family", "sizes", "remedy"),
    [
        ("BertConfig", {}, "set is_decoder to true in its config.json, or train a causal language model"),
        ("RobertaConfig", {}, "set is_decoder to true in its config.json, or train a causal language model"),
        ("XLNetConfig", XLNET, 'set attn_type to "uni" in its config.json, or train a causal language model'),
        ("XLMConfig", XLM, "set causal to true in its config.json, or train a causal language model"),
    ],
)
def test_models_that_see_later_tokens_are_refused(
    small_model: Callable[..., Any], family: str, sizes: dict[str, Any], remedy: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        check_causality(small_model(family, **sizes), BATCH)
    says = "lets tokens see later ones: other tokens from place 12 on changed the hidden states of the 11 tokens before"
    assert says in str(refused.value)
    assert str(refused.value).endswith(f"it would learn to copy what it should predict: {remedy}")


def blurred(model: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: out + change(out))
    return model


def test_a_leak_to_the_next_token_alone_is_seen(small_model: Callable[..., Any]) -> None:
    model = blurred(small_model("LlamaConfig"), lambda out: 1e-3 * torch.nn.functional.pad(out[:, 1:], (0, 0, 0, 1)))
    with pytest.raises(ConfigError, match=r"from place 12 on changed .* train a causal language model$"):
        check_causality(model, BATCH)


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_sight_within_blocks_of_tokens_is_seen(small_model: Callable[..., Any], size: int) -> None:
    def mean_of_blocks(out: torch.Tensor) -> torch.Tensor:
        return torch.cat([block.mean(1, keepdim=True).expand_as(block) for block in out.split(size, dim=1)], 1)

    with pytest.raises(ConfigError, match="lets tokens see later ones"):
        check_causality(blurred(small_model("LlamaConfig"), mean_of_blocks), BATCH)


def test_rounding_that_depends_on_all_tokens_is_no_reason(small_model: Callable[..., Any]) -> None:
    """As in a mixture of experts: the tokens of all rows decide how many an expert multiplies together."""
    check_causality(blurred(small_model("LlamaConfig"), lambda out: 1e-6 * out.sum()), BATCH)
    seeing = small_model("BertConfig")
    seeing.bert.embeddings.register_forward_hook(lambda module, args, out: out + 1e-6 * out.sum())
    with pytest.raises(ConfigError, match="lets tokens see later ones"):
        check_causality(seeing, BATCH)


def test_the_check_leaves_modes_random_states_and_gradients_as_they_were(small_model: Callable[..., Any]) -> None:
    model = small_model("LlamaConfig", attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    seen: list[tuple[int, ...]] = []

    def drawing(out: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(out.shape[:2]))
        return 0 * torch.rand(1) * random.random()

    blurred(model, drawing)
    before = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    check_causality(model, BATCH)
    assert seen == [(2, 23), (2, 23)]
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_models_that_compute_nan_are_left_to_the_first_step(small_model: Callable[..., Any]) -> None:
    check_causality(blurred(small_model("LlamaConfig"), lambda out: out * torch.nan), BATCH)


def test_on_fake_tensors_the_check_runs_once_and_decides_nothing(small_model: Callable[..., Any]) -> None:
    shapes: list[torch.Size] = []
    with fake_tensors():
        model = small_model("BertConfig")
        model.bert.embeddings.register_forward_hook(lambda module, args, out: shapes.append(out.shape[:2]))
        for _ in range(2):
            check_causality(model, {"input_ids": torch.zeros(2, 4, dtype=torch.int64)})
    assert shapes == [(2, 23), (2, 23)]
