"""Tests of fused models against their own forward, and of what is left of `fuse_` after `unfuse_`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, quantize_base_, train
from qlora_lite.errors import ConfigError
from qlora_lite.training.forward.fuse import fuse_, unfuse_

TOKENS = torch.arange(16, 56).view(2, 20)
LABELS = TOKENS.clone()
LABELS[:, :5] = -100
BATCH = {"input_ids": TOKENS, "labels": LABELS}


@pytest.fixture
def model(small_model: Callable[..., Any]) -> Any:
    """A packed Llama with adapters that are not 0, in training mode."""
    made = small_model("LlamaConfig")
    quantize_base_(made, QuantConfig())
    add_lora_(made, LoraConfig(rank=2, dropout=0.0))
    for parameter in made.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(0))
    return made.train()


def step(model: Any, **options: Any) -> tuple[Any, list[Tensor]]:
    """Returns the output for the batch, and the gradients of its loss."""
    model.zero_grad()
    output = model(**BATCH, **options)
    output.loss.backward()
    return output, [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_loss_and_gradients_are_those_of_the_own_forward(model: Any, checkpointing: str) -> None:
    expected, gradients = step(model)
    fusion = fuse_(model, checkpointing)
    found, fused_gradients = step(model)
    assert found.logits is None and expected.logits is not None
    assert (fusion.loss, fusion.logits_reason, fusion.attention) == ("logit-free", None, "sdpa")
    assert "model.norm" in fusion.modules and fusion.blocks == ["model.layers.0", "model.layers.1"]
    torch.testing.assert_close(found.loss, expected.loss)
    assert len(gradients) == len(fused_gradients) > 0
    for one, other in zip(gradients, fused_gradients, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)
    by_items, _ = step(model, num_items_in_batch=torch.tensor(100))
    torch.testing.assert_close(by_items.loss, expected.loss * int((LABELS[:, 1:] != -100).sum()) / 100)


def test_blocks_are_recomputed_as_the_dial_says(model: Any) -> None:
    fusion, calls = fuse_(model, "full"), list[str]()
    model.model.layers[1].self_attn.register_forward_hook(lambda *given: calls.append("attention"))
    step(model)
    assert len(calls) == 2 * 3  # in the probes and the step, which computes each block twice
    for switch, times in ((model.gradient_checkpointing_disable, 1), (model.gradient_checkpointing_enable, 2)):
        with pytest.warns(FutureWarning, match="deprecated"):
            switch()
        calls.clear()
        step(model)
        assert len(calls) == times and not model.is_gradient_checkpointing
    assert fusion.dial.checkpointing == "full"


def test_it_generates_with_a_cache_as_before(model: Any) -> None:
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    expected = model.eval().generate(TOKENS[:1], **options)
    fuse_(model)
    assert torch.equal(model.generate(TOKENS[:1], **options), expected)
    assert torch.equal(model.train().generate(TOKENS[:1], **options), expected)


def test_a_copy_is_fused_by_itself(model: Any) -> None:
    fuse_(model)
    expected, gradients = step(model)
    other = copy.deepcopy(model)
    unfuse_(model)
    found, copied = step(other)
    assert torch.equal(found.loss, expected.loss) and found.logits is None
    assert all(torch.equal(one, two) for one, two in zip(gradients, copied, strict=True))
    assert all(value is not model for value in (other.forward.__self__, other.fusion.dial._model))


def test_nothing_is_left_afterwards(model: Any) -> None:
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    attention = model.config._attn_implementation
    fuse_(model)
    assert model.config._attn_implementation != attention
    unfuse_(model)
    assert {name: vars(module).keys() for name, module in model.named_modules()} == {
        name: held.keys() for name, held in before.items()
    }
    assert model.config._attn_implementation == attention
    with pytest.raises(ConfigError, match="the model is not fused"):
        unfuse_(model)


def test_what_trainers_read_and_unwrap_stays(model: Any) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import extract_model_from_parallel

    AcceleratorState._reset_state(reset_partial_state=True)
    own = inspect.signature(model.forward)
    fuse_(model)
    assert inspect.signature(model.forward) == own
    prepared = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(model)
    assert step(prepared)[0].logits is None and not torch.is_autocast_enabled("cpu")
    unwrapped = extract_model_from_parallel(prepared, keep_fp32_wrapper=False)
    assert unwrapped is model and step(unwrapped)[0].logits is None
    AcceleratorState._reset_state(reset_partial_state=True)


def test_calls_that_ask_for_more_get_the_own_forward(model: Any) -> None:
    expected = model(**BATCH)
    fuse_(model)
    assert torch.allclose(model(TOKENS).logits, expected.logits, atol=1e-5)
    assert model(**BATCH, output_hidden_states=True).hidden_states is not None
    assert model(**BATCH, logits_to_keep=TOKENS.shape[1]).logits is not None
    assert len(model(**BATCH, return_dict=False)) == 1
    unfuse_(model)
    fuse_(model, keep_logits=True)
    assert torch.allclose(model(**BATCH).logits, expected.logits, atol=1e-5)


def test_a_loss_that_the_model_computes_wrongly_is_not_taken(small_model: Callable[..., Any]) -> None:
    """BART's decoder does not shift its labels, and would learn to copy."""
    model = small_model("BartConfig", is_decoder=True, decoder_layers=1, encoder_layers=1, d_model=32)
    logits = model(TOKENS).logits
    fuse_(model)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), LABELS[:, 1:].flatten())
    torch.testing.assert_close(model(**BATCH).loss, expected)


def test_train_sets_it_aside(model: Any) -> None:
    config = TrainConfig(steps=2, learning_rate=1e-3)
    plain = copy.deepcopy(model)
    expected = train(plain, [BATCH], config, progress=False).losses
    fusion = fuse_(model, "none", keep_logits=True)
    assert train(model, [BATCH], config, progress=False).losses == expected
    assert model.fusion is not fusion and (model.fusion.dial.checkpointing, model.fusion.keep_logits) == ("none", True)


def test_a_model_that_cannot_be_fused_is_refused_unchanged(model: Any, small_model: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="checkpointing must be none or full; got 5"):
        fuse_(model, 5)
    model.forward = model.forward
    with pytest.raises(ConfigError, match="LlamaForCausalLM has a forward of its own, set by another library"):
        fuse_(model)
    del model.forward
    fuse_(model)
    with pytest.raises(ConfigError, match="fused already"):
        fuse_(model)


def test_a_model_whose_tokens_see_later_ones_is_refused(small_model: Callable[..., Any]) -> None:
    model = small_model("BertConfig", is_decoder=False)
    assert type(model).__name__ == "BertLMHeadModel"
    fuse_(model)
    with pytest.raises(ConfigError, match="lets tokens see later ones"):
        model(**BATCH)


def test_the_model_of_another_task_computes_its_own_loss() -> None:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.LlamaConfig(**sizes, vocab_size=64, num_labels=3, pad_token_id=0)
    model = transformers.LlamaForSequenceClassification(config).eval()
    batch = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": torch.tensor([2, 0])}
    with torch.no_grad():
        expected = model(**batch)
        fuse_(model)
        found = model(**batch)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.logits, expected.logits)
