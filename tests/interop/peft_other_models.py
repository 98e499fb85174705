"""Cases of peft_matrix.py on other models than its small Qwen2: experts, GPT-2, and no model of transformers."""

from __future__ import annotations

import copy
from typing import Any

import peft
import torch
import transformers
from torch import nn

from peft_pairs import (
    Pair,
    check_differ,
    check_equal,
    check_gradients,
    check_refused,
    check_same,
    config,
    fill_,
    gradients,
    logits,
    pair,
    unpacked,
)
from qlora_lite import QuantConfig, quantize_base_
from qlora_lite.integrations import get_peft_model
from qlora_lite.quantization.layers import QuantizedLinear


def stacks_of_experts(format: str) -> None:
    """Several adapters on packed stacks, added, switched, copied, recomputed and removed, and refusals."""
    settings = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["o_proj"]}
    found = pair(format, family="mixtral", target_modules=["q_proj"])
    for name in ("second", "third"):
        found.add_(name, seed=len(name), **settings)
    one = check_same(found)
    for model in found.both:
        model.base_model.set_adapter(["default", "second", "third"])
    before = check_same(found)
    check_differ(before, one, "an adapter of experts")
    check_gradients(found)
    expected = {name: value.clone() for name, value in gradients(found.ours).items()}
    other = copy.deepcopy(found.ours).train()
    other.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    for name, value in gradients(other).items():
        check_equal(value, expected[name], f"recomputed gradients of {name}")
    check_equal(logits(found.ours.merge_and_unload()), before, "logits after merge_and_unload")
    other.delete_adapter("second")
    other.set_adapter("default")
    assert torch.equal(logits(other), one)
    for refused in ({"lora_dropout": 0.1}, {"use_dora": True}, {"lora_bias": True}):
        check_refused(
            other.add_adapter, next(iter(refused)), adapter_name="new", peft_config=config(**settings | refused)
        )


def conv1d(format: str) -> None:
    """GPT-2's Conv1D: outputs, gradients, and merged layers that can be saved as GPT-2's."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 48, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 16}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    quantize_base_(model, QuantConfig(format=format))
    found = Pair(
        get_peft_model(copy.deepcopy(model), config(target_modules="all-linear")),
        peft.get_peft_model(unpacked(model), config(target_modules="all-linear")),
    )
    found.fill_()
    before = check_same(found)
    check_gradients(found)
    whole = found.ours.merge_and_unload()
    fresh = transformers.GPT2LMHeadModel(model.config)
    fresh.load_state_dict(whole.state_dict())
    check_equal(logits(fresh), before, "logits of the saved model")


def custom_model(format: str) -> None:
    """Models that are not of transformers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    quantize_base_(model, QuantConfig(format=format))
    settings = {"target_modules": ["0", "2"], "task_type": None}
    ours = fill_(get_peft_model(copy.deepcopy(model), config(**settings)))
    plain = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).eval()
    with torch.no_grad():
        for index in (0, 2):
            packed: Any = model[index]
            assert isinstance(packed, QuantizedLinear)
            plain[index].weight.copy_(packed.weight.dequantize(torch.float32))
            plain[index].bias.copy_(packed.bias)
    theirs = fill_(peft.get_peft_model(plain, config(**settings)))
    x = torch.randn(5, 16)
    check_equal(ours(x), theirs(x))
    check_equal(ours.merge_and_unload()(x), theirs(x))
