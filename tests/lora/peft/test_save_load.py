"""Tests of saving and loading adapters, both ways with peft."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qlora_lite import (
    LinearWithLoRA,
    LoraConfig,
    LoraLayer,
    QuantConfig,
    add_lora_,
    load_adapter_,
    load_quantized,
    save_adapter,
)
from qlora_lite.errors import CheckpointError, ConfigError, TargetError
from qlora_lite.lora.adapters import adapter_parameters, lora_layers

TOKENS = torch.arange(12).view(2, 6)
TARGETS = [["q_proj", "down_proj"], ["embed_tokens", "v_proj"], ["layers.1.self_attn.k_proj"]]


def base(folder: Path) -> Any:
    return load_quantized(folder, QuantConfig(format="none"), dtype=torch.float32)


def adapted(folder: Path, targets: list[str]) -> Any:
    model = base(folder)
    add_lora_(model, LoraConfig(rank=3, alpha=7, target_modules=targets))
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_B, std=0.2)
    return model.eval()


@pytest.mark.parametrize("targets", TARGETS)
def test_peft_reads_ours_and_we_read_pefts(tiny_folder: Path, tmp_path: Path, targets: list[str]) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    ours = adapted(tiny_folder, targets)
    save_adapter(ours, tmp_path / "ours")
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(TOKENS).logits, ours(TOKENS).logits, rtol=1e-5, atol=1e-5)
    assert (base(tiny_folder)(TOKENS).logits - ours(TOKENS).logits).abs().max() > 1e-3
    theirs.save_pretrained(tmp_path / "theirs")
    back = base(tiny_folder)
    assert set(load_adapter_(back, tmp_path / "theirs")) == set(lora_layers(ours))
    torch.testing.assert_close(back.eval()(TOKENS).logits, ours(TOKENS).logits, rtol=1e-5, atol=1e-5)


VARIANTS = [
    {"use_rslora": True},
    {"use_rslora": True, "rank_pattern": {"layers.0.*": 5, "v_proj": 2}, "alpha_pattern": {"^model.layers.1.*": 2.5}},
    {"rank_pattern": {"layers.1.mlp.up_proj": 1}, "alpha_pattern": {"q_proj|k_proj": 11}},
]


def with_values(model: Any) -> Any:
    """A and B of any size that does something."""
    torch.manual_seed(0)
    for layer in lora_layers(model).values():
        nn.init.normal_(layer.lora_A, std=0.2)
        nn.init.normal_(layer.lora_B, std=0.2)
    return model.eval()


@pytest.mark.parametrize("variant", VARIANTS)
def test_ranks_alphas_and_rslora_are_what_peft_makes_of_them(
    tiny_folder: Path, tmp_path: Path, variant: dict[str, Any]
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    ours = base(tiny_folder)
    add_lora_(ours, LoraConfig(rank=3, alpha=7, **variant))
    save_adapter(with_values(ours), tmp_path / "ours")
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    read = peft.PeftModel.from_pretrained(plain, tmp_path / "ours").eval()
    torch.testing.assert_close(read(TOKENS).logits, ours(TOKENS).logits, rtol=1e-5, atol=1e-5)

    options = {**variant, "use_rslora": variant.get("use_rslora", False)}
    options.pop("use_rslora", None)
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    theirs = peft.get_peft_model(plain, peft.LoraConfig(r=3, lora_alpha=7, target_modules="all-linear", **options))
    torch.manual_seed(1)
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    theirs.eval().save_pretrained(tmp_path / "theirs")
    back = base(tiny_folder)
    load_adapter_(back, tmp_path / "theirs")
    torch.testing.assert_close(back.eval()(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)
    for name, layer in lora_layers(back).items():
        peer = theirs.base_model.model.get_submodule(name)
        assert (layer.rank, layer.alpha) == (peer.r["default"], peer.lora_alpha["default"])
        assert layer.scaling == peer.scaling["default"]
    # Onto layers that have adapters already: their numbers become the file's.
    for layer in lora_layers(back).values():
        layer.alpha, layer.use_rslora = 1.0, not layer.use_rslora
    load_adapter_(back, tmp_path / "theirs")
    torch.testing.assert_close(back(TOKENS).logits, theirs(TOKENS).logits, rtol=1e-5, atol=1e-5)


def test_patterns_that_peft_sorted_into_another_meaning_are_refused_by_both(tiny_folder: Path, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    ranks = {"v_proj": 2, "layers.0.*": 5}
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], rank_pattern=ranks)
    peft.get_peft_model(plain, config).save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with pytest.raises(RuntimeError, match="size mismatch"):
        peft.PeftModel.from_pretrained(plain, tmp_path)
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.v_proj\.lora_A is \(2, 64\), .* needs \(5, 64\)"):
        load_adapter_(base(tiny_folder), tmp_path)


class Nested(nn.Module):
    """Names that end in one another, and one that is no word of a regular expression."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.k = nn.Linear(4, 4)
        self.inner = nn.ModuleDict({"q": nn.Linear(4, 4), "a+": nn.Linear(4, 4)})
        self.inner["inner"] = nn.ModuleDict({"q": nn.Linear(4, 4)})


NUMBERS = st.lists(st.tuples(st.integers(1, 3), st.sampled_from([1, 2.5, 8])), min_size=5, max_size=5)


@given(numbers=NUMBERS, use_rslora=st.booleans())
@settings(max_examples=30)
def test_any_ranks_and_alphas_come_back_and_peft_reads_the_same(
    numbers: list[tuple[int, float]], use_rslora: bool
) -> None:
    from peft.utils.other import get_pattern_key

    model = Nested()
    add_lora_(model, LoraConfig(use_rslora=use_rslora))
    for (name, old), (rank, alpha) in zip(lora_layers(model).items(), numbers, strict=True):
        replacement = LoraLayer(rank, alpha, old.base_layer, dropout=0.0, use_rslora=use_rslora)
        model.get_submodule(name.rpartition(".")[0])._modules[name.rpartition(".")[2]] = replacement
    layers = lora_layers(with_values(model))
    with tempfile.TemporaryDirectory() as folder:
        save_adapter(model, Path(folder) / "a")
        # As peft writes them again.
        config = dict(sorted(json.loads((Path(folder) / "a" / "adapter_config.json").read_text()).items()))
        back = Nested()
        load_adapter_(back, Path(folder) / "a")
    for name, layer in lora_layers(back).items():
        saved = layers[name]
        assert (layer.rank, layer.alpha, layer.use_rslora) == (saved.rank, saved.alpha, use_rslora)
        assert torch.equal(layer.delta_weight(), saved.delta_weight())
        for patterns, usual, number in (
            ("rank_pattern", "r", saved.rank),
            ("alpha_pattern", "lora_alpha", saved.alpha),
        ):
            found = dict(sorted(config[patterns].items()))
            assert found.get(get_pattern_key(found, name), config[usual]) == number


def test_what_one_file_cannot_hold_is_refused(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    add_lora_(model, LoraConfig(rank=2))
    model[1].use_rslora = True
    with pytest.raises(
        ConfigError, match=r"same dropout, use_rslora and variant; got .*\(0.0, False, .lora.\), \(0.0, True, .lora.\)"
    ):
        save_adapter(model, tmp_path / "a")


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "embed_tokens", "q_proj"]])
@pytest.mark.parametrize("tying", [False, True])
def test_adapters_on_tied_weights_are_those_of_peft(
    tiny_folder: Path, tmp_path: Path, targets: list[str], tying: bool
) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    options = {"ensure_weight_tying": tying, "use_rslora": True}
    theirs = peft.get_peft_model(plain, peft.LoraConfig(r=3, lora_alpha=7, target_modules=targets, **options))
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.2)
    theirs.eval().save_pretrained(tmp_path)
    logits = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32), tmp_path
    )(TOKENS).logits
    ours = base(tiny_folder)
    assert set(load_adapter_(ours, tmp_path)) == {
        name.removeprefix("base_model.model.") for name, module in theirs.named_modules() if hasattr(module, "r")
    }
    torch.testing.assert_close(ours.eval()(TOKENS).logits, logits, rtol=1e-5, atol=1e-5)
    assert (logits - base(tiny_folder)(TOKENS).logits).abs().max() > 1e-3


def test_loading_onto_adapted_layers_keeps_the_parameters(tiny_folder: Path, tmp_path: Path) -> None:
    model = load_quantized(tiny_folder)
    add_lora_(model, LoraConfig(rank=2, alpha=4, dropout=0.1))
    save_adapter(model, tmp_path / "one")
    parameters = adapter_parameters(model)
    values = {name: parameter.clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        for parameter in parameters.values():
            parameter.add_(1)
    load_adapter_(model, tmp_path / "one")
    assert all(parameters[name] is parameter for name, parameter in adapter_parameters(model).items())
    assert all(torch.equal(parameter, values[name]) for name, parameter in parameters.items())
    other = load_quantized(tiny_folder)
    add_lora_(other, LoraConfig(rank=3))
    with pytest.raises(CheckpointError, match="has an adapter of rank 3 already"):
        load_adapter_(other, tmp_path / "one")


def test_an_embedding_trained_on_an_fp32_base_loads_onto_the_bf16_one(tiny_folder: Path, tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["embed_tokens"])).save_pretrained(tmp_path)
    assert load_adapter_(load_quantized(tiny_folder, dtype=torch.bfloat16), tmp_path) == ["model.embed_tokens"]


def test_a_lone_layer_cannot_be_saved(tmp_path: Path) -> None:
    with pytest.raises(TargetError, match="put it into a container"):
        save_adapter(LinearWithLoRA(4, 4, 2), tmp_path / "x")
