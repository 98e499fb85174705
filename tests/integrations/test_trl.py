"""Tests of trl's trainers on a packed model. What they learn is compared with trl in tests/interop/trl_trainers.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import trl
from datasets import Dataset

from qlora_lite import LoraConfig, add_lora_, load_adapter_, load_quantized
from qlora_lite.checkpoints.hub import load_tokenizer
from qlora_lite.errors import ConfigError
from qlora_lite.generation import repacked_codes
from qlora_lite.integrations import trl as packed_trl
from qlora_lite.integrations.peft import PackedLinear
from qlora_lite.lora.adapters import lora_layers
from qlora_lite.quantization.packed_weight import PackedWeight

TEXTS = [{"prompt": f"how many {i}?", "completion": f" {i} of them"} for i in range(8)]
SETTINGS: dict[str, Any] = {"max_steps": 3, "save_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2}
SETTINGS |= {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "learning_rate": 1e-3}


def test_a_checkpoint_has_the_adapter_only(tiny_folder: Path, tmp_path: Path) -> None:
    run = packed_trl.SFTTrainer(
        load_quantized(tiny_folder, dtype=torch.float32),
        trl.SFTConfig(output_dir=str(tmp_path), max_length=32, **SETTINGS),
        train_dataset=Dataset.from_list(TEXTS),
        processing_class=load_tokenizer(tiny_folder),
        peft_config=peft.LoraConfig(r=2, target_modules="all-linear"),
    )
    run.train()
    model = run.model.get_base_model()
    assert model.fusion.dial.checkpointing == "full" and isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)
    checkpoint = tmp_path / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not list(checkpoint.glob("model*"))
    again = load_quantized(tiny_folder, dtype=torch.float32)
    load_adapter_(again, checkpoint)
    tokens = torch.arange(10, 22).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, run.model.eval()(tokens).logits, rtol=1e-4, atol=1e-5)


def test_adapters_of_this_package_are_trained_and_saved(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_quantized(tiny_folder, dtype=torch.float32)
    add_lora_(model, LoraConfig(rank=2))
    args = trl.SFTConfig(output_dir=str(tmp_path), max_length=32, gradient_checkpointing=False, **SETTINGS)
    data, tokenizer = Dataset.from_list(TEXTS), load_tokenizer(tiny_folder)
    run = packed_trl.SFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    assert model.fusion.dial.checkpointing == "none"
    run.train()
    assert all(layer.factors[1].any() for layer in lora_layers(model).values())
    again = load_quantized(tiny_folder, dtype=torch.float32)
    load_adapter_(again, tmp_path / "checkpoint-3")
    tokens = torch.arange(10, 22).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model.eval()(tokens).logits, rtol=1e-4, atol=1e-5)
    for name, sentence in (("DPO", "DPOTrainer compares with the base"), ("GRPO", "GRPOTrainer compares")):
        with pytest.raises(ConfigError, match=sentence):
            getattr(packed_trl, f"{name}Trainer")(model=model, train_dataset=data)


def test_completions_are_generated_from_copies_if_they_are_allowed(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[bool] = []
    model = load_quantized(tiny_folder)
    weights = [module for module in model.modules() if isinstance(module, PackedWeight)]
    model.model.norm.register_forward_hook(lambda *given: held.append(weights[0].decode_copy is not None))
    monkeypatch.setattr(repacked_codes, "_suits", lambda weight: True)  # on CPUs without the kernel too
    monkeypatch.setattr(repacked_codes, "repacked", lambda weight: copies.append(weight) or weight)
    copies: list[Any] = []
    own = {"max_completion_length": 3, "num_generations": 2, "max_steps": 2, "save_strategy": "no"}
    run = packed_trl.GRPOTrainer(
        model,
        args=trl.GRPOConfig(output_dir=str(tmp_path), **SETTINGS | own),
        train_dataset=Dataset.from_list([{"prompt": row["prompt"]} for row in TEXTS]),
        processing_class=load_tokenizer(tiny_folder),
        peft_config=peft.LoraConfig(r=2, target_modules="all-linear"),
        reward_funcs=lambda completions, **given: [float(len(text)) for text in completions],
        decode_copies=True,
    )
    monkeypatch.setattr(PackedWeight, "few_rows_product", lambda self, rows: None)
    run.train()
    assert len(copies) == 2 * len(weights)  # once a generation
    assert held[:3] == [True] * 3 and not held[-1] and weights[0].decode_copy is None


def test_models_that_are_not_packed_and_adapted_are_refused(tiny_folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be one of load_quantized; got 'some/model'"):
        packed_trl.SFTTrainer("some/model")
    with pytest.raises(ConfigError, match="the model has no adapters; pass peft_config"):
        packed_trl.SFTTrainer(load_quantized(tiny_folder))
    selective = trl.SFTConfig("unused", use_cpu=True, bf16=False, gradient_checkpointing_kwargs={"selective": True})
    with pytest.raises(ConfigError, match="selective checkpointing of trl"):
        packed_trl.SFTTrainer(
            load_quantized(tiny_folder), selective, peft_config=peft.LoraConfig(target_modules="all-linear")
        )
    with pytest.raises(AttributeError, match="has no attribute 'NoTrainer'"):
        packed_trl.NoTrainer  # noqa: B018


def test_the_loss_of_routers_comes_from_the_same_forward(small_model: Callable[..., Any]) -> None:
    tokens = torch.arange(16, 56).view(2, 20)
    given = {"input_ids": tokens, "labels": tokens, "fused_lm_head": True, "output_router_logits": True}
    found, calls = {}, list[int]()
    for name, add in (("ours", packed_trl.add_fused_lm_head), ("trl", trl.trainer.utils.add_fused_lm_head)):
        model = small_model("MixtralConfig", num_local_experts=4)
        add(model)
        model(**given)  # tries the model
        model.model.register_forward_hook(lambda *_: calls.append(1))
        calls.clear()
        output = model(**given)
        assert len(calls) == 1
        output.loss.backward()
        found[name] = [output.loss, output.aux_loss, *(p.grad for p in model.parameters() if p.grad is not None)]
    assert float(found["ours"][1]) > 0
    for mine, theirs in zip(found["ours"], found["trl"], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_a_trainer_leaves_trl_as_it_was(tiny_folder: Path) -> None:
    before = trl.trainer.sft_trainer.add_fused_lm_head
    with pytest.raises(ValueError, match="train_dataset"):
        packed_trl.SFTTrainer(
            load_quantized(tiny_folder),
            trl.SFTConfig("unused", use_cpu=True, bf16=False),
            peft_config=peft.LoraConfig(target_modules="all-linear"),
        )
    assert trl.trainer.sft_trainer.add_fused_lm_head is before is not packed_trl.add_fused_lm_head
    assert issubclass(packed_trl.SFTTrainer, trl.SFTTrainer) and packed_trl.SFTTrainer is packed_trl.SFTTrainer
    assert "GRPOTrainer" in dir(packed_trl)
