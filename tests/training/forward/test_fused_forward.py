"""Tests of fused modules: recognized by their computation, with equal gradients, and restored afterwards."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized
from qlora_lite.lora.adapters import adapter_parameters
from qlora_lite.surgery import repeated_blocks
from qlora_lite.training.forward import fused_forward
from qlora_lite.training.forward.activation_checkpointing import checkpointed
from qlora_lite.training.forward.fused_forward import fused
from qlora_lite.training.objective.losses import logit_free_loss

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


def build(family: str, **options: Any) -> Any:
    config = getattr(transformers, f"{family}Config")(**SIZES, **options)
    return getattr(transformers, f"{family}ForCausalLM")(config)


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> tuple[float, list[Tensor]]:
    model.zero_grad()
    loss = logit_free_loss(model, batch)
    loss.backward()
    return float(loss.detach()), [parameter.grad.clone() for parameter in adapter_parameters(model).values()]


def batch_of(kind: str) -> dict[str, Tensor]:
    ids = torch.randint(64, (3, 12))
    batch = {"input_ids": ids, "labels": ids.clone()}
    if kind.endswith("padded"):
        mask = torch.ones_like(ids)
        mask[0, :4] = mask[1, -3:] = 0
        mask = mask if kind == "left padded" else mask.flip(1)
        batch |= {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    elif kind == "packed":
        batch["position_ids"] = torch.cat((torch.arange(5), torch.arange(7))).expand(3, 12)
    return batch


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3", "Granite", "Gemma", "Gemma2", "Phi3"])
@pytest.mark.parametrize("kind", ["plain", "left padded", "right padded", "packed"])
def test_gradients_are_those_of_the_model_itself(family: str, kind: str) -> None:
    model = build(family).train()
    add_lora_(model, LoraConfig(rank=2, target_modules="all-linear" if family != "Gemma" else ["q_proj", "down_proj"]))
    for name, parameter in adapter_parameters(model).items():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    batch = batch_of(kind)
    loss, wanted = gradients(model, batch)
    for checkpointing in ("none", "full"):
        with fused(model), checkpointed(model, checkpointing):
            lean_loss, found = gradients(model, batch)
        assert lean_loss == pytest.approx(loss, rel=1e-5)
        for mine, theirs in zip(found, wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_a_norms_output_may_be_changed_in_place() -> None:
    """As blocks of experts with jitter do."""
    model: Any = build("Mixtral", router_jitter_noise=0.3).train()
    add_lora_(model, LoraConfig(rank=2, target_modules=["q_proj", "gate"], dropout=0))
    for name, parameter in adapter_parameters(model).items():
        if name.endswith("lora_B"):
            nn.init.normal_(parameter, std=0.1)
    batch, found = batch_of("plain"), []
    for exchanged in (False, True):
        torch.manual_seed(1)
        with fused(model) if exchanged else nullcontext():
            found.append(gradients(model, batch))
    assert found[1][0] == pytest.approx(found[0][0], rel=1e-5)
    for mine, theirs in zip(found[1][1], found[0][1], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-4)


def test_what_is_recognized() -> None:
    with fused(build("Llama")) as names:
        block = ["input_layernorm", "mlp", "post_attention_layernorm", "self_attn"]
        assert sorted(names) == [
            *(f"model.layers.{number}.{part}" for number in range(2) for part in block),
            "model.norm",
        ]
    with fused(build("Gemma")) as names:  # its norms multiply with 1 + weight
        assert sorted(names) == [
            f"model.layers.{number}.{part}" for number in range(2) for part in ("mlp", "self_attn")
        ]
    with fused(build("Llama", hidden_act="relu")) as names:
        assert not any(name.endswith("mlp") for name in names)


def test_a_norm_that_is_called_one_but_computes_another_thing_is_left_alone() -> None:
    class LlamaRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return self.weight * x / (x.abs().mean(-1, keepdim=True) + self.variance_epsilon)

    with fused(nn.Sequential(LlamaRMSNorm())) as names:
        assert names == []


def test_everything_is_put_back() -> None:
    model = build("Llama")
    own = ALL_ATTENTION_FUNCTIONS["sdpa"]
    own_forward = model.model.norm.forward
    forward = model.model.norm.forward = lambda x: own_forward(x)
    with pytest.raises(RuntimeError, match="stop"), fused(model) as names:
        assert "model.norm" not in names  # somebody gave it a forward of its own
        assert ALL_ATTENTION_FUNCTIONS["sdpa"] is not own
        raise RuntimeError("stop")
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is own
    assert model.model.norm.forward is forward
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == ["model.norm"]


def test_a_kept_block_keeps_products_and_no_more(tiny_folder: Path) -> None:
    """q, k and v, attention's output, two residual streams, gate and up; nothing in fp32 but low-rank parts."""
    model = load_quantized(tiny_folder, QuantConfig())
    add_lora_(model, LoraConfig(rank=2))
    model.train()
    config, rows, tokens = model.config, 2, 16
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    block = repeated_blocks(model)[0]
    forward = block.forward

    def noted(*given: Any, **options: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            return forward(*given, **options)

    ids = torch.randint(100, (rows, tokens))
    with fused(model):
        block.forward = noted
        logit_free_loss(model, {"input_ids": ids, "labels": ids}).backward()
        del block.forward
    wide = {place: tensor for place, tensor in kept.items() if place not in own and tensor.numel() > 6 * rows * tokens}
    assert {tensor.dtype for tensor in wide.values()} == {torch.bfloat16}
    head = config.hidden_size // config.num_attention_heads
    widths = 3 * config.hidden_size + config.num_attention_heads * head + 2 * config.num_key_value_heads * head
    widths += 2 * config.intermediate_size
    rotary = 2 * tokens * head * 2
    assert sum(t.untyped_storage().nbytes() for t in wide.values()) <= rows * tokens * widths * 2 + rotary


def test_attention_beyond_ours_goes_to_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    monkeypatch.setattr(fused_forward, "causal_attention", lambda *given: (calls.append("ours"), given[0])[1])
    q = torch.randn(1, 2, 6, 4)

    def own(*given: Any, **options: Any) -> str:
        return "theirs"

    def attend(query: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
        return fused_forward.fused_attention(own, masks, nn.Identity(), query, q, q, mask, **options)

    masks = fused_forward.CausalMasks()
    causal = torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()
    assert attend(q) != "theirs" and attend(q, causal) != "theirs" and calls == ["ours", "ours"]
    assert attend(q, dropout=0.1) == attend(q, is_causal=False) == attend(q, softcap=3.0) == "theirs"
    assert attend(q[:, :, :1]) == attend(q.double()) == "theirs"
    assert attend(q, torch.ones_like(causal)) == "theirs"  # sees what comes later
    blind = causal.clone()
    blind[..., 2, :] = False
    assert attend(q, blind) == attend(q, causal.float()) == "theirs"
