"""Tests of running a model block by block: it is the model's own forward, or the model is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qlora_lite import architecture
from qlora_lite.calibration.block_chain import BlockChain
from qlora_lite.errors import ConfigError

FAMILIES: list[tuple[str, dict[str, Any]]] = [
    ("LlamaConfig", {}),
    ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2}),
    ("GPTNeoXConfig", {}),
    ("MixtralConfig", {}),
    ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    ("MambaConfig", {"state_size": 8}),
    ("Gemma3TextConfig", {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}),
]


def batch_of(vocabulary: int, padded: bool) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, vocabulary, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    return {"input_ids": ids, "attention_mask": mask} if padded else {"input_ids": ids}


@pytest.mark.parametrize(("family", "sizes"), FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_blocks_one_after_the_other_are_the_model(
    small_model: Callable[..., Any], family: str, sizes: dict[str, Any], padded: bool
) -> None:
    model = small_model(family, **sizes)
    batch = batch_of(64, padded)
    chain = BlockChain.of(model, batch)
    assert len(chain.blocks) == 2
    recorded = chain.record(batch)
    hidden = recorded.hidden
    with torch.no_grad():
        for block, call in zip(chain.blocks, recorded.calls, strict=True):
            hidden = call.run(block, hidden)
        expected = architecture.hidden_states(model, batch)
    assert torch.equal(chain.head_inputs(batch, hidden), expected)


def test_a_model_whose_blocks_pass_on_more_is_refused(small_model: Callable[..., Any]) -> None:
    """The blocks of T5's decoder take what those of its encoder gave."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 64}
    model: Any = T5ForConditionalGeneration(T5Config(**sizes)).eval()
    ids = torch.randint(5, 64, (2, 9))
    with pytest.raises(ConfigError, match="a T5ForConditionalGeneration cannot be calibrated block by block: its bloc"):
        BlockChain.of(model, {"input_ids": ids, "decoder_input_ids": ids})
    model = small_model("LlamaConfig", num_hidden_layers=0)
    with pytest.raises(ConfigError, match="a LlamaForCausalLM cannot be calibrated block by block: it has no repeated"):
        BlockChain.of(model, {"input_ids": ids})


def test_a_value_that_depends_on_an_earlier_block_is_noticed(small_model: Callable[..., Any]) -> None:
    model = small_model("LlamaConfig")
    layers = model.model.layers
    seen: list[torch.Tensor] = []

    class Second(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: torch.Tensor, **options: Any) -> torch.Tensor:
            return self.inner(hidden, **options)  # type: ignore[no-any-return]

    class Backbone(type(model.model)):  # type: ignore[misc]
        def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
            hidden = self.embed_tokens(input_ids)
            positions = torch.arange(input_ids.shape[1])[None]
            rotary = self.rotary_emb(hidden, positions)
            for layer in self.layers:
                hidden = layer(hidden, position_embeddings=rotary, scale=hidden.mean())
            seen.append(hidden)
            return type("Output", (), {"last_hidden_state": self.norm(hidden)})

    model.model.__class__ = Backbone
    layers[1] = Second(layers[1])
    with pytest.raises(ConfigError, match="its blocks take other values that depend on earlier blocks"):
        BlockChain.of(model, batch_of(64, False))
