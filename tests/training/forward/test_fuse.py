"""Tests of fused models against their own forward, and of what is left of `fuse_` after `unfuse_`."""

from __future__ import annotations

import copy
import inspect
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qlora_lite import LoraConfig, QuantConfig, TrainConfig, add_lora_, quantize_base_, train
from qlora_lite.compute import cpu_attention
from qlora_lite.errors import ConfigError
from qlora_lite.lora.adapters import remove_lora_
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


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_choices_of_the_machine_hold_in_forward_and_in_recomputation(
    model: Any, checkpointing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names, kernels = [], cpu_attention._kernels

    def noted(*given: Tensor) -> Any:
        names.append(kernels(*given)[:2])
        return kernels(*given)

    monkeypatch.setattr(cpu_attention, "_kernels", noted)
    monkeypatch.setenv("QLORA_LITE_CHOICES", "default,attention_forward=torch,attention_backward=torch")
    fuse_(model, checkpointing)
    monkeypatch.setenv("QLORA_LITE_CHOICES", "default")  # they were asked for once
    step(model)
    assert set(names) == {("torch", "torch")}


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
    with pytest.raises(ConfigError, match=r"checkpointing must be one of none, full, or a number of bytes; got 0"):
        fuse_(model, 0)
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


def trained_values_(model: Any) -> Any:
    """Gives what is trained values that are not those it starts with, equal in each call."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            parameter.data = parameter.data + 0.1 * noise
    return model


@pytest.mark.parametrize("settings", [{"modules_to_save": ["norm"]}, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_adapters_may_move_fused_modules(model: Any, settings: dict[str, Any]) -> None:
    remove_lora_(model)
    losses = []
    for fuse in (False, True):
        made = copy.deepcopy(model)
        if fuse:
            fuse_(made)
        torch.manual_seed(0)
        add_lora_(made, LoraConfig(rank=2, dropout=0.0, **{"target_modules": ["q_proj"], **settings}))
        losses.append(step(trained_values_(made))[0].loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    unfuse_(made)
    assert step(made)[0].logits is not None
    assert not [name for name, module in made.named_modules() if "forward" in vars(module)]


def test_a_model_of_peft_is_fused_inside(model: Any) -> None:
    import peft

    from qlora_lite.integrations.peft import lora_config

    remove_lora_(model)
    adapted = peft.get_peft_model(model, lora_config(model, r=2, modules_to_save=["norm"]))
    expected, gradients = step(trained_values_(adapted))
    fusion = fuse_(adapted)
    found, fused_gradients = step(adapted)
    assert found.logits is None and fusion.loss == "logit-free" and adapted.fusion is fusion
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(fused_gradients, gradients, rtol=1e-4, atol=1e-6)
    unfuse_(adapted)
    assert step(adapted)[0].logits is not None


def test_keys_of_earlier_tokens_are_never_lost(model: Any) -> None:
    """Recomputed blocks get no cache, so a call that recomputes must not return one, nor leave out a given one."""
    expected = model(TOKENS).logits[:, -1:]
    with torch.no_grad():
        cache = model(TOKENS[:, :-1]).past_key_values
    fuse_(model)
    assert model(TOKENS, use_cache=True).past_key_values is None
    torch.testing.assert_close(model(TOKENS[:, -1:], past_key_values=cache).logits, expected)


def test_a_trained_prefix_is_seen(small_model: Callable[..., Any]) -> None:
    import peft

    losses = []
    for fuse in (False, True):
        model = small_model("LlamaConfig")
        if fuse:
            fuse_(model)
        torch.manual_seed(0)
        adapted = peft.get_peft_model(model, peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
        output = adapted(**BATCH, attention_mask=torch.ones_like(TOKENS))
        output.loss.backward()
        losses.append((output.loss.item(), adapted.prompt_encoder.default.embedding.weight.grad.norm().item()))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_what_the_loss_without_logits_does_not_have_is_never_ignored(model: Any) -> None:
    fuse_(model)
    assert model(**BATCH, logits_to_keep=0).logits is None
    assert model(**BATCH, use_cache=False, output_hidden_states=False).logits is None
    assert model(**BATCH, some_setting=0).logits is not None  # as max_length_q of attention over packed rows
    model.config.output_hidden_states = True
    assert len(model(**BATCH).hidden_states) == 3
    model.config.output_hidden_states = False
    model.loss_function = lambda logits, labels, vocab_size, **given: logits.sum() * 0 + 42
    assert model(**BATCH).loss == 42


def test_losses_of_routers_are_returned_where_they_are_asked_for(small_model: Callable[..., Any]) -> None:
    model = small_model("MixtralConfig", router_aux_loss_coef=0.5)
    expected = model(**BATCH, output_router_logits=True)
    fuse_(model)
    found = model(**BATCH, output_router_logits=True)
    torch.testing.assert_close((found.loss, found.aux_loss), (expected.loss, expected.aux_loss))
    model.config.output_router_logits = True
    assert model(**BATCH).logits is None
    torch.testing.assert_close(model(**BATCH).loss, expected.loss)


def test_packed_rows_are_checked_when_they_first_come(small_model: Callable[..., Any]) -> None:
    model = small_model("Lfm2Config", layer_types=["conv", "full_attention"])
    fuse_(model)
    model(**BATCH)
    with pytest.raises(ConfigError, match="lets packed examples see each other"):
        model(**BATCH, position_ids=torch.arange(10).repeat(2, 2))


def test_images_are_no_part_of_the_probe(tiny_vision_folder: Path) -> None:
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(tiny_vision_folder, dtype=torch.float32)
    image, vision = model.config.image_token_id, model.config.vision_config
    count = (vision.image_size // vision.patch_size // model.config.scale_factor) ** 2
    words = torch.arange(5, 75)[None].expand(2, -1)  # an image's tokens, and more words than the probe has
    tokens = torch.cat([words[words != image].view(2, -1), torch.full((2, count), image)], dim=1)
    batch = {"input_ids": tokens, "labels": tokens, "pixel_values": torch.randn(2, 1, 3, *2 * [vision.image_size])}
    expected = model(**batch).loss
    fusion = fuse_(model)
    torch.testing.assert_close(model(**batch).loss, expected)
    assert (fusion.loss, fusion.logits_reason) == ("logit-free", None)


def test_what_would_be_fused_by_half_is_refused(model: Any) -> None:
    fuse_(model)
    with pytest.raises(ConfigError, match=r"does not run in torch.nn.DataParallel; start a process for each device"):
        model._replicate_for_data_parallel()
    with pytest.raises(ConfigError, match="a fused model cannot be pickled; unfuse_ it first"):
        torch.save(model, io.BytesIO())
    unfuse_(model)
    with pytest.warns(FutureWarning):
        model.gradient_checkpointing_enable()
    with pytest.raises(ConfigError, match="gradient checkpointing is on, and would recompute layers a second time"):
        fuse_(model)


def test_generation_during_training_is_as_before(model: Any) -> None:
    def texts() -> list[Tensor]:
        found = []
        for options in ({"do_sample": True, "num_return_sequences": 2}, {"num_beams": 3}):
            torch.manual_seed(0)
            found.append(model.generate(TOKENS[:1, :8], max_new_tokens=4, **options))
        return found

    expected = texts()
    fuse_(model)
    step(model)
    assert all(torch.equal(one, two) for one, two in zip(texts(), expected, strict=True))
