"""Tests of vision-language models with and without their towers: loading, text alone, exports."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from qlora_lite import (
    LoraConfig,
    QuantConfig,
    TrainConfig,
    add_lora_,
    export_merged,
    load_adapter_,
    load_quantized,
    save_adapter,
    train,
)
from qlora_lite.checkpoints import hub
from qlora_lite.errors import ConfigError, TargetError
from qlora_lite.export.quantized import save_quantized
from qlora_lite.lora.adapters import lora_layers
from qlora_lite.lora.targets import left_out_of_all_linear, select_targets
from qlora_lite.quantization.layers import QuantizedLinear
from qlora_lite.quantization.selection import left_unpacked
from qlora_lite.surgery import NOT_LANGUAGE_MODEL, is_below, tower_names

TOWERS = {
    "gemma3": ["model.vision_tower", "model.multi_modal_projector"],
    "qwen2_5_vl": ["model.visual"],
    "qwen3_vl": ["model.visual"],
    "llava": ["model.vision_tower", "model.multi_modal_projector"],
    "smolvlm": ["model.vision_model", "model.connector"],
    "idefics3": ["model.vision_model", "model.connector"],
}
TOKENS = torch.arange(20, 44).view(2, 12)
BATCH = {"input_ids": TOKENS, "labels": TOKENS}


@pytest.mark.parametrize("family", TOWERS)
def test_towers_are_what_all_linear_and_packing_leave_alone(
    make_tiny_vision_model: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    model = hub.empty_model(hub.read_config(make_tiny_vision_model(tmp_path, family)), torch.bfloat16)
    towers = TOWERS[family]
    assert tower_names(model) == towers
    chosen = [layer.name for layer in select_targets(model, LoraConfig())]
    assert len(chosen) == 14 and not any(is_below(name, towers) for name in chosen)
    everywhere = [layer.name for layer in select_targets(model, LoraConfig(target_modules="all-linear-with-towers"))]
    beside = left_out_of_all_linear(model)
    assert set(everywhere) == {*chosen, *beside} and set(beside.values()) == {NOT_LANGUAGE_MODEL}
    assert left_out_of_all_linear(model, "all-linear-with-towers") == left_out_of_all_linear(model, ["q_proj"]) == {}
    assert left_unpacked(model, QuantConfig()) == beside and left_unpacked(model, QuantConfig(skip_modules=())) == {}
    excluded = select_targets(model, LoraConfig(exclude_modules=[towers[0].rpartition(".")[2]]))
    assert [layer.name for layer in excluded] == chosen


@pytest.mark.parametrize("family", ["gemma3", "smolvlm"])
def test_text_trains_and_exports_without_the_tower(
    make_tiny_vision_model: Callable[..., Path], tmp_path: Path, family: str
) -> None:
    folder = make_tiny_vision_model(tmp_path / "base", family)
    whole, text = load_quantized(folder), load_quantized(folder, text_only=True)
    towers = TOWERS[family]
    stored = load_file(folder / "model.safetensors")
    of_tower = text.load_report.not_loaded
    assert of_tower and set(of_tower) <= stored.keys()
    assert sum(p.numel() for p in whole.parameters()) > sum(p.numel() for p in text.parameters())
    assert not [name for name, _ in text.named_parameters() if is_below(name, towers)]
    losses = []
    for model in (whole, text):
        torch.manual_seed(0)
        add_lora_(model, LoraConfig(rank=2))
        adapted = lora_layers(model)
        assert len(adapted) == 14 and not any(is_below(name, towers) for name in adapted)
        result = train(model, [BATCH], TrainConfig(steps=1), progress=False)
        assert result.logits_reason is None
        losses.append(result.losses)
    assert losses[0] == losses[1]
    save_adapter(text, tmp_path / "adapter")
    assert load_adapter_(load_quantized(folder), tmp_path / "adapter") == list(adapted)
    export_merged(text, tmp_path / "out", torch.float32)
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert written.keys() == stored.keys()
    assert all(torch.equal(written[name], stored[name]) for name in of_tower)
    assert (tmp_path / "out" / "preprocessor_config.json").is_file()


def test_what_needs_the_tower_is_refused_without_it(
    tiny_vision_folder: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    model: Any = load_quantized(tiny_vision_folder, text_only=True)
    assert model.load_report.in_words() == ["not loaded (38 tensors): model.vision_model, model.connector"]
    pictures = {"pixel_values": torch.ones(2, 1, 3, 28, 28), "pixel_attention_mask": torch.ones(2, 1, 28, 28)}
    with pytest.raises(ConfigError, match=r"model\.vision_model was not loaded \(text_only\), so the model takes text"):
        model(input_ids=TOKENS, **pictures)
    with pytest.raises(ConfigError, match=r"a packed checkpoint needs model\.vision_model, model\.connector, which"):
        save_quantized(model, tmp_path / "packed")
    with pytest.raises(ConfigError, match="an export without the names and files of the full-precision checkpoint"):
        export_merged(model, tmp_path / "out", names="model")
    with pytest.raises(ConfigError, match="a LlamaForCausalLM has none; leave it away"):
        load_quantized(tiny_folder, text_only=True)
    with pytest.raises(TargetError, match="a LlamaForCausalLM has no tower beside its language model; use 'all-lin"):
        add_lora_(load_quantized(tiny_folder), LoraConfig(target_modules="all-linear-with-towers"))


def test_a_tower_is_packed_where_skip_modules_does_not_name_it(tiny_vision_folder: Path, tmp_path: Path) -> None:
    packed = load_quantized(tiny_vision_folder, QuantConfig(skip_modules=("lm_head",)))
    tower = [name for name, module in packed.named_modules() if isinstance(module, QuantizedLinear)]
    assert any(name.startswith("model.vision_model.") for name in tower)
    assert packed.load_report.left_unpacked == {}
    save_quantized(packed, tmp_path / "packed")  # a packed folder keeps its choice, and can be read without the tower
    again = load_quantized(tmp_path / "packed")
    assert [name for name, module in again.named_modules() if isinstance(module, QuantizedLinear)] == tower
    text: Any = load_quantized(tmp_path / "packed", text_only=True)
    assert torch.equal(text(TOKENS).logits, packed(TOKENS).logits)
