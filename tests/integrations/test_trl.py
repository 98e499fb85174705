"""Tests of real trainers of trl on a packed model: one base, the losses of a plain forward, checkpoints of adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl
from datasets import Dataset

from qlora_lite import load_adapter_, load_quantized
from qlora_lite.checkpoints.hub import load_tokenizer
from qlora_lite.integrations.peft import PackedLinear, lora_config
from qlora_lite.training.forward.fuse import fuse_

PAIRS = [{"prompt": f"how many {i}?", "chosen": f" {i} of them", "rejected": " none"} for i in range(8)]
TEXTS = [{"prompt": pair["prompt"], "completion": pair["chosen"]} for pair in PAIRS]


def trained(folder: Path, out: Path, trainer: Any, config: Any, rows: list[dict[str, str]], fuse: bool = True) -> Any:
    """Returns a trainer of trl after three steps."""
    model = load_quantized(folder, dtype=torch.float32)
    if fuse:
        fuse_(model)
    torch.manual_seed(0)
    settings: dict[str, Any] = {"max_steps": 3, "save_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 2}
    settings |= {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "max_length": 32}
    run = trainer(
        model,
        args=config(output_dir=str(out), **settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=load_tokenizer(folder),
        peft_config=lora_config(model, r=2),
    )
    run.train()
    return run


def losses(run: Any) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def test_supervised_training_has_the_losses_of_a_plain_forward(tiny_folder: Path, tmp_path: Path) -> None:
    fused = trained(tiny_folder, tmp_path / "fused", trl.SFTTrainer, trl.SFTConfig, TEXTS)
    plain = trained(tiny_folder, tmp_path / "plain", trl.SFTTrainer, trl.SFTConfig, TEXTS, fuse=False)
    assert losses(fused) == pytest.approx(losses(plain), rel=1e-5)
    model = fused.model.get_base_model()
    assert model.fusion.dial.checkpointing == "full" and isinstance(model.model.layers[0].mlp.up_proj, PackedLinear)
    checkpoint = tmp_path / "fused" / "checkpoint-3"
    assert (checkpoint / "adapter_model.safetensors").is_file() and not list(checkpoint.glob("model*"))
    again = load_quantized(tiny_folder, dtype=torch.float32)
    load_adapter_(again, checkpoint)
    tokens = torch.arange(10, 22).view(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, fused.model.eval()(tokens).logits, rtol=1e-4, atol=1e-5)


def test_preferences_are_learned_with_one_base_in_memory(tiny_folder: Path, tmp_path: Path) -> None:
    run = trained(tiny_folder, tmp_path, trl.DPOTrainer, trl.DPOConfig, PAIRS)
    assert run.ref_model is None
    assert losses(run)[0] == pytest.approx(0.6931472, abs=1e-6)
