"""Tests of peft's layer around a packed embedding, by itself."""

from __future__ import annotations

import peft
import torch
from torch import nn

from qlora_lite import QuantConfig
from qlora_lite.integrations.peft_embedding import PackedEmbedding
from qlora_lite.quantization.layers import QuantizedEmbedding
from qlora_lite.quantization.packed_weight import PackedWeight

TOKENS = torch.tensor([[3, 0, 7], [2, 2, 9]])


def embedding(dtype: torch.dtype = torch.float32) -> PackedEmbedding:
    """An embedding of 12 tokens in 8 dimensions, with an adapter whose A is not 0."""
    base = QuantizedEmbedding(PackedWeight.of(torch.randn(12, 8), QuantConfig(), "int8"), dtype, padding_idx=0)
    layer = PackedEmbedding(base, "default", config=peft.LoraConfig(), r=2, lora_alpha=3)
    nn.init.normal_(layer.lora_embedding_A["default"])
    return layer


def test_the_output_is_that_of_the_docstring() -> None:
    layer = embedding()
    lora_A, lora_B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    expected = layer.get_base_layer()(TOKENS) + 1.5 * (lora_B @ lora_A).T[TOKENS]
    torch.testing.assert_close(layer(TOKENS), expected)
    layer(TOKENS).sum().backward()
    assert lora_A.grad is not None and not lora_A.grad[:, 0].any() and lora_A.grad[:, 3].any()  # 0 is padding


def test_a_merge_stands_beside_the_base() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        layer = embedding(dtype)
        before = layer(TOKENS)
        codes = layer.get_base_layer().weight.packed.clone()
        layer.merge()
        assert layer.merged and layer(TOKENS).dtype == dtype
        torch.testing.assert_close(layer(TOKENS), before, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-2)
        whole = layer.unload_and_optionally_merge_module(merge=False)  # it keeps what is merged
        assert type(whole) is nn.Embedding and whole.padding_idx == 0 and torch.equal(whole(TOKENS), layer(TOKENS))
        layer.unmerge()
        assert torch.equal(layer(TOKENS), before) and torch.equal(layer.get_base_layer().weight.packed, codes)
        assert isinstance(layer.unload_and_optionally_merge_module(merge=False), QuantizedEmbedding)
