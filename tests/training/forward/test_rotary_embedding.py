"""Tests of rotary embeddings as one node: the bits of transformers' own function, and what is left to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.gptj import modeling_gptj
from transformers.models.llama import modeling_llama

from qlora_lite.training.forward import rotary_embedding
from qlora_lite.training.forward.rotary_embedding import computes_rotary, fused_rotary, rotary


def inputs(dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """Queries and keys as a model makes them, transposed views with gradients, and cos and sin."""
    made = [torch.randn(2, 11, heads, 16).to(dtype).transpose(1, 2).requires_grad_() for heads in (6, 2)]
    angles = torch.randn(2, 11, 8).repeat(1, 1, 2)
    return made, [angles.cos().to(dtype), angles.sin().to(dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_the_bits_of_transformers(dtype: torch.dtype) -> None:
    tensors, angles = inputs(dtype)
    found, expected = rotary(*tensors, *angles), modeling_llama.apply_rotary_pos_emb(*tensors, *angles)
    grads = [torch.randn(2, 11, y.shape[1], 16).to(dtype).transpose(1, 2) for y in found]
    mine, theirs = (torch.autograd.grad(outputs, tensors, grads) for outputs in (found, expected))
    for ours, right in zip((*found, *mine), (*expected, *theirs), strict=True):
        assert torch.equal(ours, right)
    assert all(grad.transpose(1, 2).is_contiguous() for grad in mine)  # the layers before read them as they are


def test_other_functions_are_not_recognized() -> None:
    assert computes_rotary(modeling_llama.apply_rotary_pos_emb)
    assert not computes_rotary(modeling_gptj.apply_rotary_pos_emb)
    assert not computes_rotary(lambda query, key, cos, sin: (query, key))
    with FakeTensorMode():  # as in a rehearsal, where tensors have no values
        assert computes_rotary(modeling_llama.apply_rotary_pos_emb)


def test_a_model_calls_it_where_gradients_are_wanted(
    small_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, own = small_model("LlamaConfig"), modeling_llama.apply_rotary_pos_emb
    calls: list[int] = []
    monkeypatch.setattr(rotary_embedding, "rotary", lambda *given: (calls.append(1), rotary(*given))[1])
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
    with fused_rotary(model):
        calls.clear()  # those of the probe
        assert torch.equal(model(input_ids=ids).logits, expected) and len(calls) == model.config.num_hidden_layers
        with torch.no_grad():
            model(input_ids=ids)
        tensors, angles = inputs(torch.float32)
        modeling_llama.apply_rotary_pos_emb(*tensors, *(angle.unsqueeze(1) for angle in angles), unsqueeze_dim=0)
        assert len(calls) == model.config.num_hidden_layers
    assert modeling_llama.apply_rotary_pos_emb is own
