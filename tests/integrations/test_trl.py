"""Tests of trl's trainers on a packed model: one base, the figures of trl's own head, checkpoints of adapters."""

from __future__ import annotations

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
from qlora_lite.integrations import trl as packed_trl
from qlora_lite.integrations.peft import PackedLinear, lora_config
from qlora_lite.lora.adapters import lora_layers

PAIRS = [{"prompt": f"how many {i}?", "chosen": f" {i} of them", "rejected": " none"} for i in range(8)]
TEXTS = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]
PROMPTS = [{"prompt": pair["prompt"]} for pair in PAIRS]
SETTINGS: dict[str, Any] = {"max_steps": 3, "save_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2}
SETTINGS |= {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "learning_rate": 1e-3}
FIGURES = ("loss", "entropy", "mean_token_accuracy", "logits/chosen", "rewards/margins", "grad_norm")


def trained(folder: Path, out: Path, name: str, rows: list[dict[str, str]], ours: bool = True, **options: Any) -> Any:
    """Returns a trainer after three steps: one of ours with a plain configuration of peft, or trl's own."""
    model = load_quantized(folder, dtype=torch.float32)
    own: dict[str, Any] = {"max_length": 32} if name != "GRPO" else {"max_completion_length": 6, "num_generations": 2}
    args = getattr(trl, f"{name}Config")(output_dir=str(out), **SETTINGS, **own)
    plain = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    run = getattr(packed_trl if ours else trl, f"{name}Trainer")(
        model=model,
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(folder),
        peft_config=peft.LoraConfig(**plain) if ours else lora_config(model, **plain),
        **options,
    )
    run.train()
    return run


def figures(run: Any) -> list[dict[str, float]]:
    """The figures that the trainer logged in each step."""
    log = [entry for entry in run.state.log_history if "loss" in entry]
    return [{name: entry[name] for name in FIGURES if name in entry} for entry in log]


def length_reward(completions: list[str], **given: object) -> list[float]:
    return [float(len(set(text))) for text in completions]


@pytest.mark.parametrize(
    ("name", "rows", "options"),
    [("SFT", TEXTS, {}), ("DPO", PAIRS, {}), ("GRPO", PROMPTS, {"reward_funcs": length_reward})],
)
def test_figures_are_those_of_trl(
    name: str, rows: list[dict[str, str]], options: dict[str, Any], tiny_folder: Path, tmp_path: Path
) -> None:
    run = trained(tiny_folder, tmp_path / "ours", name, rows, **options)
    plain = trained(tiny_folder, tmp_path / "plain", name, rows, ours=False, **options)
    assert len(figures(run)) == 3
    for mine, theirs in zip(figures(run), figures(plain), strict=True):
        assert mine.keys() >= {"loss", "entropy"}
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    model = run.model.get_base_model()
    assert model.fusion.dial.checkpointing == "full" and isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)
    if name == "DPO":
        assert run.ref_model is None
        assert figures(run)[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)


def test_a_checkpoint_has_the_adapter_only(tiny_folder: Path, tmp_path: Path) -> None:
    run = trained(tiny_folder, tmp_path, "SFT", TEXTS)
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
