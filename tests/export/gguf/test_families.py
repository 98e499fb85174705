"""Tests of the table of families: transformers' reader of GGUF files gets the model's tensors and settings back.

For the two families that it does not read, the tensors are undone here. What llama.cpp has built in is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lite.errors import CheckpointError
from qlora_lite.export.gguf import export_gguf
from qlora_lite.export.gguf.families import FAMILIES, context_length, family_of
from qlora_lite.export.gguf.library import write_gguf
from qlora_lite.export.gguf.read_back import by_model_names, empty_model, read_back
from qlora_lite.export.gguf.tensors import gguf_tensors
from qlora_lite.export.merged import AS_SAVED, planned_model

# Config class and sizes of a small model of each family.
SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"num_attention_heads": 4, "attention_bias": True, "tie_word_embeddings": False}),
    "mistral": ("MistralConfig", {"num_attention_heads": 4, "sliding_window": None}),
    "mixtral": ("MixtralConfig", {"num_attention_heads": 4}),
    "qwen2": (
        "Qwen2Config",
        {"num_attention_heads": 4, "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}},
    ),
    "qwen3": ("Qwen3Config", {}),
    "qwen2_moe": ("Qwen2MoeConfig", {"shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("Qwen3MoeConfig", {"norm_topk_prob": True}),
    "gemma": ("GemmaConfig", {}),
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 16, "sliding_window": 4}),
    "gemma3_text": ("Gemma3TextConfig", {"query_pre_attn_scalar": 16, "sliding_window": 4}),
    "phi3": ("Phi3Config", {"num_attention_heads": 4}),
    "gpt2": ("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": None}),
}
NOT_READ = ("mixtral", "gemma")


def by_transformers(path: Path, model: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Returns config and tensors as transformers' reader has them."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    read = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)
    return read["config"], read["tensors"]


@pytest.mark.parametrize("kind", [kind for kind in FAMILIES if kind not in NOT_READ])
def test_transformers_reads_tensors_and_settings_back(
    make_model: Callable[..., Any], tmp_path: Path, kind: str
) -> None:
    family, sizes = SIZES[kind]
    model = make_model(family, **sizes)
    assert model.config.model_type == kind
    done = export_gguf(model, tmp_path / "out", "f32")
    # gguf has no name for Mistral but Llama's, so the reader is shown a Llama.
    like = make_model("LlamaConfig", **sizes) if kind == "mistral" else model
    config, tensors = by_transformers(tmp_path / "out" / done.file, like)
    expected = model.state_dict()
    assert expected.keys() - tensors.keys() <= {"lm_head.weight"}
    assert ("lm_head.weight" in tensors) is not model.config.tie_word_embeddings
    added = FAMILIES[kind].norm_plus_one
    for name, tensor in tensors.items():
        assert torch.equal(tensor, expected[name] + 1 - 1 if added and name.endswith("norm.weight") else expected[name])
    for key, value in config.items():
        if key not in ("model_type", "_model_name_or_path", "norm_topk_prob", "n_ctx", "feed_forward_length"):
            rope = getattr(model.config, "rope_parameters", {})
            own = rope.get("full_attention", rope)[key] if key == "rope_theta" else getattr(model.config, key)
            assert own == pytest.approx(value), key


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_file_is_read_back_as_the_model(make_model: Callable[..., Any], tmp_path: Path, kind: str) -> None:
    """As `--verify` reads it: through transformers' own conversion of the checkpoint's tensors."""
    family, sizes = SIZES[kind]
    model = make_model(family, **sizes)
    with planned_model(model, "dequantized", torch.float32, AS_SAVED) as planned:
        tensors = planned.plan.tensors
        write_gguf(
            tmp_path / "a.gguf",
            FAMILIES[kind].architecture,
            {},
            gguf_tensors(tensors, FAMILIES[kind], model.config, "f32"),
        )
        empty = empty_model(model, False)
        found = by_model_names(empty, read_back(tmp_path / "a.gguf", tensors, FAMILIES[kind], model.config))
    expected = model.state_dict()
    assert expected.keys() - found.keys() <= {"lm_head.weight"}
    for name, tensor in found.items():
        count = tensor.shape[0]
        rows = torch.cat([tensor.rows(0, 1), tensor.rows(1, count)])
        torch.testing.assert_close(rows, expected[name], rtol=0, atol=2e-7, msg=name)


def undone(values: dict[str, torch.Tensor], kind: str, model: Any) -> dict[str, torch.Tensor]:
    """The tensors of a file under transformers' names, by code that shares nothing with the package."""
    names = {
        "token_embd": "model.embed_tokens",
        "output_norm": "model.norm",
        "output": "lm_head",
        **{f"attn_{short}": f"self_attn.{short}_proj" for short in "qkv"},
        "attn_output": "self_attn.o_proj",
        **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate_inp": "mlp.gate",
    }
    found = {}
    for name, value in values.items():
        block = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", name)
        prefix, own = (f"model.layers.{block[1]}.", block[2]) if block else ("", name.removesuffix(".weight"))
        if own in ("attn_q", "attn_k") and kind == "mixtral":
            heads = model.config.num_attention_heads if own == "attn_q" else model.config.num_key_value_heads
            order = torch.arange(len(value)).view(heads, 2, -1).transpose(1, 2).reshape(-1)
            value = torch.empty_like(value).index_copy_(0, order, value)
        if kind == "gemma" and own.endswith("norm"):
            value = value - 1
        if own.endswith("_exps"):
            found[f"{prefix}{own}"] = value
            continue
        found[f"{prefix}{names[own]}.weight"] = value
    for layer in range(model.config.num_hidden_layers if kind == "mixtral" else 0):
        gate, up, down = (found.pop(f"model.layers.{layer}.ffn_{part}_exps") for part in ("gate", "up", "down"))
        found[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        found[f"model.layers.{layer}.mlp.experts.down_proj"] = down
    return found


@pytest.mark.parametrize("kind", NOT_READ)
def test_the_others_are_undone(
    make_model: Callable[..., Any], tmp_path: Path, fields: Any, values: Any, kind: str
) -> None:
    family, sizes = SIZES[kind]
    model = make_model(family, **sizes)
    done = export_gguf(model, tmp_path / "out", "f32")
    found = undone(values(tmp_path / "out" / done.file), kind, model)
    expected = model.state_dict()
    assert expected.keys() - found.keys() <= {"lm_head.weight"}
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6, msg=name)
    read, arch = fields(tmp_path / "out" / done.file), FAMILIES[kind].architecture
    settings = {
        "block_count": 2,
        "embedding_length": 32,
        "feed_forward_length": 48,
        "attention.head_count": model.config.num_attention_heads,
        "attention.head_count_kv": 2,
        "attention.key_length": 16,
        "attention.value_length": 16,
        "vocab_size": 304,
        "context_length": model.config.max_position_embeddings,
        "rope.freq_base": model.config.rope_parameters["rope_theta"],
        "attention.layer_norm_rms_epsilon": model.config.rms_norm_eps,
        **({"expert_count": 4, "expert_used_count": 2, "rope.dimension_count": 16} if kind == "mixtral" else {}),
    }
    assert {key: read[f"{arch}.{key}"] for key in settings} == pytest.approx(settings)


def test_settings_that_transformers_does_not_read(make_model: Callable[..., Any], tmp_path: Path, fields: Any) -> None:
    expected = {
        "qwen2_moe": {"qwen2moe.expert_feed_forward_length": 24, "qwen2moe.expert_shared_feed_forward_length": 40},
        "gemma2": {
            "gemma2.attn_logit_softcapping": 50.0,
            "gemma2.final_logit_softcapping": 30.0,
            "gemma2.attention.sliding_window": 4,
            "gemma2.attention.value_length": 16,
        },
        "gemma3_text": {"gemma3.attention.sliding_window": 4, "gemma3.rope.freq_base_swa": 10_000.0},
        "gpt2": {"gpt2.feed_forward_length": 128, "gpt2.context_length": 64},
        "phi3": {"phi3.rope.dimension_count": 16, "phi3.attention.sliding_window": 0},
    }
    for kind, settings in expected.items():
        family, sizes = SIZES[kind]
        done = export_gguf(make_model(family, **sizes), tmp_path / kind, "f32")
        read = fields(tmp_path / kind / done.file)
        assert {key: read[key] for key in settings} == settings


def config_of(kind: str, **changes: Any) -> Any:
    import transformers

    family, sizes = SIZES[kind]
    return getattr(transformers, family)(**{"num_hidden_layers": 6, **sizes, **changes})


@pytest.mark.parametrize(
    ("kind", "changes", "problem"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu', where llama.cpp has 'silu'"),
        ("qwen3", {"attention_bias": True}, "attention_bias True, where llama.cpp has False"),
        ("qwen2_moe", {"norm_topk_prob": True}, "norm_topk_prob True, where llama.cpp has False"),
        ("qwen3_moe", {"mlp_only_layers": [1]}, r"mlp_only_layers \[1\], where llama.cpp has \[\]"),
        ("gemma2", {"query_pre_attn_scalar": 20, "head_dim": 16}, "query_pre_attn_scalar 20, where llama.cpp has 16"),
        ("gemma2", {"final_logit_softcapping": None, "head_dim": 16}, "no final_logit_softcapping"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 6, "head_dim": 16}, "layer_types other than one"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
    ],
)
def test_what_llama_cpp_would_compute_differently_is_refused(kind: str, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(CheckpointError, match=f"computed differently by llama.cpp: its config has .*{problem}"):
        family_of(config_of(kind, **changes))


def test_an_unknown_family_is_refused_with_the_known_ones(make_model: Callable[..., Any], tmp_path: Path) -> None:
    model = make_model("GPTNeoXConfig")
    with pytest.raises(CheckpointError, match="cannot be written of model type 'gpt_neox'; known are llama, mistral, "):
        export_gguf(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_context_ends_with_a_window_that_llama_cpp_lacks() -> None:
    window = {"sliding_window": 256, "max_position_embeddings": 1024}
    mistral, gemma = config_of("mistral", **window), config_of("gemma2", head_dim=16, **window)
    assert context_length(mistral, family_of(mistral)) == 256
    assert context_length(gemma, family_of(gemma)) == 1024
    unused = config_of("qwen2", use_sliding_window=False, **window)
    assert context_length(unused, family_of(unused)) == 1024
