"""Tests of the check that packed examples do not see each other."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lite import QuantConfig, load_quantized
from qlora_lite.errors import ConfigError
from qlora_lite.planning.rehearsal import fake_tensors
from qlora_lite.training.objective.packing import check_packing, is_packed

# Packed, but with one example in each row.
SINGLE = {"input_ids": torch.arange(8).view(2, 4), "position_ids": torch.arange(4).repeat(2, 1)}


def test_packed_batches_have_positions_and_no_mask() -> None:
    assert is_packed(SINGLE)
    assert not is_packed({**SINGLE, "attention_mask": torch.ones(2, 4)})
    assert not is_packed({"input_ids": SINGLE["input_ids"]})
    assert not is_packed({**SINGLE, "position_ids": torch.zeros(2, 3, 4)})  # of images and videos


SLIDING = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
CONVOLUTION = {"layer_types": ["conv", "full_attention"]}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
STATE_SPACE = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_d_ssm": 64, "mamba_n_groups": 1}


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("LlamaConfig", {}),
        ("GPT2Config", {}),
        ("GPT2Config", {"n_positions": 16}),
        ("MixtralConfig", {}),
        ("Gemma3TextConfig", SLIDING),
        ("Llama4TextConfig", {"intermediate_size_mlp": 48}),  # it names its base by another word
        ("Lfm2Config", {"layer_types": ["full_attention", "full_attention"]}),
    ],
)
def test_models_that_compute_packed_examples_as_alone(
    small_model: Callable[..., Any], family: str, sizes: dict[str, Any], rows: int
) -> None:
    check_packing(small_model(family, **sizes), SINGLE, rows)


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
        ("BloomConfig", {}),
        ("Lfm2Config", CONVOLUTION),
        ("Lfm2Config", {"dtype": torch.bfloat16, **CONVOLUTION}),
        ("MambaConfig", {}),
        ("BambaConfig", STATE_SPACE),
        ("FalconH1Config", STATE_SPACE),
        ("Qwen3NextConfig", LINEAR_ATTENTION),
        ("RecurrentGemmaConfig", {"lru_width": 32, "num_hidden_layers": 3}),
    ],
)
def test_models_that_let_packed_examples_see_each_other_are_refused(
    small_model: Callable[..., Any], family: str, sizes: dict[str, Any]
) -> None:
    model = small_model(family, **sizes)
    says = f"a {type(model).__name__} lets packed examples see each other: other tokens in its neighbours changed the "
    with pytest.raises(ConfigError, match=rf"{says}.* by [0-9.e-]+ of their norm; train with packing=False, and give"):
        check_packing(model, SINGLE, 2)


def add_after(model: Any, name: str, change: Callable[[torch.Tensor], Any]) -> None:
    """Adds to the output of a module what `change` makes of it, if it is not None."""

    def hook(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        added = change(out)
        return out if added is None else out + added

    model.get_submodule(name).register_forward_hook(hook)


def test_what_later_examples_tell_earlier_ones_is_seen_too(small_model: Callable[..., Any]) -> None:
    model = small_model("LlamaConfig")
    add_after(model, "model.embed_tokens", lambda out: 1e-3 * torch.nn.functional.pad(out[:, 1:], (0, 0, 0, 1)))
    with pytest.raises(ConfigError, match="see each other"):
        check_packing(model, SINGLE, 1)


def test_rounding_that_depends_on_other_rows_is_no_reason(small_model: Callable[..., Any]) -> None:
    """As in a mixture of experts, whose products have another shape for other tokens anywhere in the batch."""
    noise = {"LlamaConfig": {}, "OPTConfig": {"ffn_dim": 48, "word_embed_proj_dim": 32}}
    models = {family: small_model(family, **sizes) for family, sizes in noise.items()}
    for model, name in zip(models.values(), ("model.embed_tokens", "model.decoder.embed_tokens"), strict=True):
        add_after(model, name, lambda out: 1e-6 * out.sum())
    check_packing(models["LlamaConfig"], SINGLE, 2)
    with pytest.raises(ConfigError, match="see each other"):
        check_packing(models["OPTConfig"], SINGLE, 2)


def test_positions_that_are_not_followed_are_refused(small_model: Callable[..., Any]) -> None:
    model = small_model("GPT2Config")
    wpe = model.transformer.wpe
    wpe.register_forward_hook(lambda module, args, out: wpe.weight[: out.shape[1]].expand_as(out))
    says = (
        r"a GPT2LMHeadModel computes packed examples other than alone: .* so the model does not follow position_ids; "
    )
    with pytest.raises(ConfigError, match=says + "train with packing=False"):
        check_packing(model, SINGLE, 2)


@pytest.mark.parametrize(
    ("raised", "says"),
    [
        (
            TypeError("got an unexpected keyword 'position_ids'\n"),
            r"does not take packed rows \(TypeError: got an unex",
        ),
        (None, "computes NaN or infinity for packed rows; train with packing=False"),
    ],
)
def test_models_that_cannot_compute_packed_rows(
    small_model: Callable[..., Any], raised: Exception | None, says: str
) -> None:
    model = small_model("LlamaConfig")

    def broken(out: torch.Tensor) -> torch.Tensor:
        if raised is not None:
            raise raised
        return out * torch.nan

    add_after(model, "model.embed_tokens", broken)
    with pytest.raises(ConfigError, match=says):
        check_packing(model, SINGLE, 1)


def test_the_check_leaves_modes_and_random_states_as_they_were(small_model: Callable[..., Any]) -> None:
    model = small_model("LlamaConfig", attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    seen: list[tuple[int, ...]] = []

    def drawing(out: torch.Tensor) -> torch.Tensor:
        seen.append(tuple(out.shape[:2]))
        return 0 * torch.rand(1) * random.random()

    add_after(model, "model.embed_tokens", drawing)
    before = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    check_packing(model, SINGLE, 2)
    assert seen == [(2, 59), (2, 59), (2, 23)]
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_made_up_rows_keep_to_the_vocabulary_and_the_longest_sequence(small_model: Callable[..., Any]) -> None:
    model = small_model("GPT2Config", n_positions=16, vocab_size=300, bos_token_id=299, eos_token_id=299)
    seen: list[torch.Tensor] = []
    model.transformer.wte.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    check_packing(model, {name: value[:1] for name, value in SINGLE.items()}, 1)
    assert [len(ids[0]) for ids in seen] == [15, 15, 6]
    tokens, others, alone = (ids[0] for ids in seen)
    assert all(int(ids.min()) >= 75 and int(ids.max()) < 225 for ids in seen)
    assert (tokens != others).tolist() == [True] * 5 + [False] * 6 + [True] * 4
    assert torch.equal(tokens[5:11], alone) and len(set(tokens.tolist())) == 15


def test_integer_products_are_off_meanwhile(tiny_folder: Path) -> None:
    """All tokens of a batch decide which columns they treat apart, which changes a result by far more than rounding."""
    model = load_quantized(tiny_folder, QuantConfig(format="int8", int8_activations=True))
    weights = [module for module in model.modules() if getattr(module, "int8_activations", False)]
    seen: list[bool] = []
    add_after(model, "model.embed_tokens", lambda out: seen.append(weights[0].int8_activations))
    check_packing(model, SINGLE, 2)
    assert seen == [False] * 3 and all(module.int8_activations for module in weights)


def test_on_fake_tensors_the_check_runs_once_and_decides_nothing(small_model: Callable[..., Any]) -> None:
    shapes: list[torch.Size] = []
    with fake_tensors():
        model = small_model("Lfm2Config", **CONVOLUTION)
        add_after(model, "model.embed_tokens", lambda out: shapes.append(out.shape[:2]))
        batch = {"input_ids": torch.zeros(2, 4, dtype=torch.int64), "position_ids": torch.arange(4).repeat(2, 1)}
        for _ in range(2):
            check_packing(model, batch, 2)
    assert shapes == [(2, 59), (2, 59), (2, 23)]
