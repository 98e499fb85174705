"""Tests of the tensors of a GGUF file: order of rows, experts, types, tensors without a place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_lite.checkpoints.safetensors_write import PlannedTensor, planned
from qlora_lite.errors import CheckpointError
from qlora_lite.export.gguf.families import FAMILIES
from qlora_lite.export.gguf.tensors import gguf_tensors, permuted_rows, tensor_type


def in_rows(tensor: Tensor) -> PlannedTensor:
    return PlannedTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor.split(1))


def config_of(family: str, **sizes: Any) -> Any:
    import transformers

    return getattr(transformers, family)(num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, **sizes)


def test_permuted_rows_rotate_to_the_same_scores() -> None:
    """Rotating halves in transformers' order and neighbours in llama.cpp's gives the same scores of Q and K."""
    heads, size, inputs = 3, 8, 5
    query, key, x = torch.randn(heads * size, inputs), torch.randn(heads * size, inputs), torch.randn(inputs)
    angles = torch.rand(size // 2)

    def halves(rows: Tensor) -> Tensor:
        first, second = rows.view(heads, 2, size // 2).unbind(1)
        return torch.cat(
            [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], 1
        )

    def neighbours(rows: Tensor) -> Tensor:
        first, second = rows.view(heads, size // 2, 2).unbind(2)
        pairs = [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()]
        return torch.stack(pairs, 2).flatten(1)

    theirs = (halves(query @ x) * (key @ x).view(heads, size)).sum(1)
    moved = permuted_rows(query, heads), permuted_rows(key, heads)
    ours = (neighbours(moved[0] @ x) * (moved[1] @ x).view(heads, size)).sum(1)
    torch.testing.assert_close(ours, theirs)


def test_rows_of_queries_and_keys_move_by_their_own_heads() -> None:
    name = "model.layers.0.self_attn.{}_proj.weight"
    tensors = {name.format(part): in_rows(torch.randn(rows, 6)) for part, rows in (("q", 16), ("k", 8), ("v", 8))}
    config = config_of("LlamaConfig")
    found = {tensor.name: tensor for tensor in gguf_tensors(tensors, FAMILIES["llama"], config, "f32")}
    whole = {part: torch.cat(list(tensors[name.format(part)].slices())) for part in "qkv"}
    (query,), (key,) = (list(found[f"blk.0.attn_{part}.weight"].pieces()) for part in "qk")
    assert torch.equal(query, permuted_rows(whole["q"], 4)) and torch.equal(key, permuted_rows(whole["k"], 2))
    values = list(found["blk.0.attn_v.weight"].pieces())
    assert len(values) == 8 and torch.equal(torch.cat(values), whole["v"])  # in slices, unchanged


def test_experts_are_stacked_in_the_order_of_their_numbers() -> None:
    experts = [torch.full((2, 4), float(number)) for number in range(11)]
    tensors = {
        f"model.layers.0.block_sparse_moe.experts.{number}.w1.weight": in_rows(expert)
        for number, expert in reversed(list(enumerate(experts)))
    }
    (stack,) = gguf_tensors(tensors, FAMILIES["mixtral"], config_of("MixtralConfig"), "f16")
    assert (stack.name, stack.shape, stack.type) == ("blk.0.ffn_gate_exps.weight", (11, 2, 4), "f16")
    assert torch.equal(torch.cat(list(stack.pieces())), torch.cat(experts))


@pytest.mark.parametrize(
    ("name", "shape", "type"),
    [
        ("blk.0.ffn_up.weight", (64, 64), "q4_0"),
        ("blk.0.ffn_up.weight", (64, 40), "f16"),  # no whole blocks
        ("blk.0.attn_norm.weight", (64,), "f32"),
        ("blk.0.attn_q.bias", (64,), "f32"),
        ("blk.0.ffn_gate_inp.weight", (8, 64), "f32"),
        ("position_embd.weight", (64, 64), "f32"),
        ("token_embd.weight", (64, 64), "q8_0"),
        ("output.weight", (64, 64), "q8_0"),
    ],
)
def test_types(name: str, shape: tuple[int, ...], type: str) -> None:
    assert tensor_type(name, shape, "q4_0") == type


def test_tensors_without_a_place_are_refused_by_name() -> None:
    tensors = {"model.layers.0.mlp.extra.weight": planned(torch.ones(2, 2))}
    problem = r"llama.cpp's llama has no place for these tensors of the llama: model.layers.0.mlp.extra.weight"
    with pytest.raises(CheckpointError, match=problem):
        gguf_tensors(tensors, FAMILIES["llama"], config_of("LlamaConfig"), "f16")


def test_a_head_beside_the_embedding_is_refused_where_llama_cpp_ties_them(make_model: Callable[..., Any]) -> None:
    tensors = {name: planned(torch.ones(2, 2)) for name in ("model.embed_tokens.weight", "lm_head.weight")}
    with pytest.raises(CheckpointError, match="gemma has one weight for embedding and head, and the adapter made two"):
        gguf_tensors(tensors, FAMILIES["gemma"], config_of("GemmaConfig"), "f16")
