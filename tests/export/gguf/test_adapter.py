"""Tests of adapters as GGUF files: base + alpha / rank * B A, in llama.cpp's layout, is the merged GGUF."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized, save_adapter
from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.export.gguf import adapter, adapter_to_gguf, export_gguf
from qlora_lite.lora.adapters import lora_layers

PLAIN = QuantConfig(format="none")


@pytest.fixture(scope="module")
def make_base(make_model: Callable[..., Any], tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Saves a small model of a config class with a tokenizer; returns its folder."""

    def made(family: str, **sizes: Any) -> Path:
        folder = tmp_path_factory.mktemp(family)
        make_model(family, num_hidden_layers=1, num_attention_heads=4, **sizes).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return made


@pytest.fixture(scope="module")
def llama(make_base: Callable[..., Path]) -> Path:
    return make_base("LlamaConfig")


def adapted(base: Path, folder: Path, **settings: Any) -> Any:
    """Loads a base, adds an adapter with random B, and saves the adapter."""
    model = load_quantized(base, PLAIN, dtype=torch.float32)
    add_lora_(model, LoraConfig(**{"rank": 4, "alpha": 6, "target_modules": "all-linear", **settings}))
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
    save_adapter(model, folder)
    return model


ALL_LINEAR = [*(f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down"))]


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("LlamaConfig", {"target_modules": [*ALL_LINEAR, "embed_tokens", "lm_head"], "use_rslora": True}),
        ("LlamaConfig", {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"k_proj": 20}}),
        ("GPT2Config", {"target_modules": ["c_attn", "c_fc"]}),
    ],
)
def test_base_and_adapter_make_the_merged_file(
    make_base: Callable[..., Path],
    llama: Path,
    tmp_path: Path,
    values: Any,
    fields: Any,
    family: str,
    settings: dict[str, Any],
) -> None:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 64} if family == "GPT2Config" else {}
    base = llama if family == "LlamaConfig" else make_base(family, **sizes)
    model = adapted(base, tmp_path / "adapter", **settings)
    plain = export_gguf(load_quantized(base, PLAIN, dtype=torch.float32), tmp_path / "plain", "f32")
    merged = export_gguf(model, tmp_path / "merged", "f32")
    done = adapter_to_gguf(tmp_path / "adapter", base, tmp_path / "out", "f32")
    assert done.layers == len(lora_layers(model))
    file = tmp_path / "out" / done.file
    read, found, settings_read = values(tmp_path / "plain" / plain.file), values(file), fields(file)
    assert settings_read["general.type"] == "adapter" and settings_read["adapter.type"] == "lora"
    expected = values(tmp_path / "merged" / merged.file)
    for name in {key.rpartition(".")[0] for key in found}:
        a, b = found[f"{name}.lora_a"], found[f"{name}.lora_b"]
        rank = b.shape[1]
        scale = settings_read["adapter.lora.alpha"] / rank
        update = a @ b.T if name == "token_embd.weight" else b @ a
        torch.testing.assert_close(read.pop(name) + scale * update, expected[name], rtol=1e-4, atol=1e-5)
    for name, value in read.items():
        assert torch.equal(value, expected[name])
    assert (tmp_path / "out" / "Modelfile").read_text().endswith(f"FROM {base.resolve()}\nADAPTER ./{done.file}\n")


def test_what_llama_cpp_does_not_take_is_refused_with_all_reasons(
    make_base: Callable[..., Path], llama: Path, tmp_path: Path
) -> None:
    adapted(llama, tmp_path / "dora", variant="dora", modules_to_save=["norm"])
    problem = "cannot be written as a GGUF adapter, because of use_dora: .*; norms, which llama.cpp passes over: .*norm"
    with pytest.raises(CheckpointError, match=problem):
        adapter_to_gguf(tmp_path / "dora", llama, tmp_path / "out")
    tied = make_base("LlamaConfig", tie_word_embeddings=True)
    adapted(tied, tmp_path / "tied", target_modules=["embed_tokens", "q_proj"])
    with pytest.raises(CheckpointError, match=r"one of two tied weights, which llama\.cpp has once: model\.embed_tok"):
        adapter_to_gguf(tmp_path / "tied", tied, tmp_path / "out")
    with pytest.raises(ConfigError, match="must be f32, f16 or bf16; got 'q8_0'"):
        adapter_to_gguf(tmp_path / "tied", tied, tmp_path / "out", "q8_0")
    assert not (tmp_path / "out").exists()


def test_the_base_is_compared_unless_any_is_taken(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(folder: Path, base: Path) -> None:
        raise CheckpointError(f"{folder} was trained on another base than {base}")

    adapted(llama, tmp_path / "adapter", target_modules=["v_proj"])
    monkeypatch.setattr(adapter, "check_trained_on_checkpoint", other)
    with pytest.raises(CheckpointError, match="another base"):
        adapter_to_gguf(tmp_path / "adapter", llama, tmp_path / "out")
    assert adapter_to_gguf(tmp_path / "adapter", llama, tmp_path / "out", any_base=True).layers == 1
