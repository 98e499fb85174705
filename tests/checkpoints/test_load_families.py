"""Tests of loading families of transformers whose tensors, dtypes or buffers are unusual, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qlora_lite import (
    LoraConfig,
    QuantConfig,
    add_lora_,
    architecture,
    export_merged,
    load_adapter_,
    load_quantized,
    save_adapter,
)
from qlora_lite.checkpoints import hub
from qlora_lite.errors import CheckpointError
from qlora_lite.export.merged import merge_checkpoint
from qlora_lite.export.quantized import save_quantized

TOKENS = torch.arange(2, 14).view(2, 6)
PLAIN = QuantConfig(format="none")
DEEPSEEK = {
    "n_routed_experts": 4,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
}
FALCON_H1 = {
    "mamba_d_ssm": 64,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "ssm_multipliers": [0.5, 0.25, 2.0, 0.7, 1.5],
}
GEMMA3N = {
    "layer_types": ["sliding_attention", "full_attention"],
    "num_kv_shared_layers": 0,
    "laurel_rank": 8,
    "vocab_size_per_layer_input": 64,
    "hidden_size_per_layer_input": 16,
    "activation_sparsity_pattern": [0.95, 0.0],
}
GEMMA4 = {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 16}
ZAMBA2 = {
    "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
    "mamba_d_state": 16,
    "n_mamba_heads": 4,
    "mamba_ngroups": 1,
    "chunk_size": 8,
    "adapter_rank": 8,
    "num_key_value_heads": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 4,
}


def perturbed(model: Any) -> Any:
    """Adds noise to every float that a checkpoint holds, so that one that is lost, swapped or rounded shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.randn_like(tensor)
    return model


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(model.named_parameters()) | dict(model.named_buffers())


def loaded_by_transformers(folder: Path, dtype: torch.dtype) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)


def assert_same(ours: Any, theirs: Any) -> None:
    here, there = tensors(ours), tensors(theirs)
    assert here.keys() == there.keys()
    assert {name: tensor.dtype for name, tensor in here.items()} == {n: tensor.dtype for n, tensor in there.items()}
    assert [name for name, tensor in here.items() if not torch.equal(tensor, there[name])] == []
    with torch.no_grad():
        assert torch.equal(ours(TOKENS, use_cache=False).logits, theirs(TOKENS, use_cache=False).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_transformers_keeps_in_float32_is_kept(
    small_model: Callable[..., Any], tmp_path: Path, dtype: torch.dtype
) -> None:
    perturbed(small_model("DeepseekV3Config", **DEEPSEEK)).save_pretrained(tmp_path)
    ours = load_quantized(tmp_path, PLAIN, dtype=dtype)
    bias = ours.model.layers[1].mlp.gate.e_score_correction_bias
    assert bias.dtype == torch.float32 and ours.dtype == dtype
    assert_same(ours, loaded_by_transformers(tmp_path, dtype))
    packed = load_quantized(tmp_path, QuantConfig(), dtype=dtype)
    assert torch.equal(packed.model.layers[1].mlp.gate.e_score_correction_bias, bias)


def test_a_dtype_that_a_model_gives_a_tensor_is_kept(small_model: Callable[..., Any], tmp_path: Path) -> None:
    sizes = {"attn_config": None, "num_hidden_layers": 2, "layer_types": ["linear_attention", "full_attention"]}
    linear = {f"linear_{part}": size for part, size in zip(("num_key_heads", "num_value_heads"), (2, 2), strict=True)}
    linear |= {"linear_key_head_dim": 16, "linear_value_head_dim": 16}
    perturbed(small_model("OlmoHybridConfig", **{**sizes, **linear})).save_pretrained(tmp_path)
    ours, theirs = load_quantized(tmp_path, PLAIN), loaded_by_transformers(tmp_path, torch.bfloat16)
    assert {tensor.dtype for tensor in tensors(ours).values()} == {torch.bfloat16, torch.float32}
    assert_same(ours, theirs)


def test_merges_on_disk_keep_float32_as_merges_in_memory(small_model: Callable[..., Any], tmp_path: Path) -> None:
    source = tmp_path / "source"
    perturbed(small_model("DeepseekV3Config", **DEEPSEEK)).save_pretrained(source)
    model = load_quantized(source)
    add_lora_(model, LoraConfig(rank=2, target_modules=["o_proj"]))
    nn.init.normal_(model.model.layers[0].self_attn.o_proj.lora_B)
    save_adapter(model, tmp_path / "adapter")
    export_merged(model, tmp_path / "memory", dtype=torch.float32)
    merge_checkpoint(source, tmp_path / "adapter", tmp_path / "disk", dtype=torch.float32)
    one, two, plain = (load_quantized(tmp_path / n, PLAIN, dtype=torch.float32) for n in ("memory", "disk", "source"))
    assert_same(one, two)
    kept, original = (m.model.layers[1].mlp.gate.e_score_correction_bias for m in (one, plain))
    assert torch.equal(kept, original) and not torch.equal(kept, kept.bfloat16().float())
    export_merged(model, tmp_path / "half")
    merge_checkpoint(source, tmp_path / "adapter", tmp_path / "half_on_disk")
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    for folder in ("half", "half_on_disk"):
        written = load_file(tmp_path / folder / "model.safetensors")
        assert torch.equal(written.pop(name), original)
        assert {tensor.dtype for tensor in written.values()} == {torch.float16}


@pytest.mark.parametrize(
    ("family", "sizes", "buffer"),
    [
        ("FalconH1Config", FALCON_H1, "model.layers.1.mamba.mup_vector"),
        ("Gemma3nTextConfig", GEMMA3N, "model.embed_tokens.embed_scale"),
    ],
)
def test_buffers_are_computed_by_the_model_that_encloses_a_module(
    small_model: Callable[..., Any], tmp_path: Path, family: str, sizes: dict[str, Any], buffer: str
) -> None:
    perturbed(small_model(family, **sizes)).save_pretrained(tmp_path)
    ours = load_quantized(tmp_path, PLAIN, dtype=torch.float32)
    assert buffer in dict(ours.named_buffers())
    assert_same(ours, loaded_by_transformers(tmp_path, torch.float32))
    with torch.no_grad():
        assert load_quantized(tmp_path, QuantConfig(), dtype=torch.float32)(TOKENS).logits.isfinite().all()


def test_integer_buffers_are_computed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import transformers

    text = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    text |= {"num_key_value_heads": 2, "intermediate_size": 32}
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5
    )
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    usual = torch.empty_like

    def poisoned(*args: Any, **kwargs: Any) -> Tensor:
        made = usual(*args, **kwargs)
        return made if made.is_meta or made.is_floating_point() else made.fill_(77)

    monkeypatch.setattr(torch, "empty_like", poisoned)  # memory that nobody writes to keeps 77
    found = [b for name, b in load_quantized(tmp_path, PLAIN).named_buffers() if name.endswith("position_ids")]
    assert [buffer.tolist() for buffer in found] == [[[0, 1, 2, 3]]]


def test_a_buffer_that_nothing_computes_is_named(small_model: Callable[..., Any], tmp_path: Path) -> None:
    model = hub.empty_model(small_model("LlamaConfig").config, torch.bfloat16)
    for name, dtype in (("counts", torch.int64), ("scales", torch.float32)):
        model.model.layers[1].register_buffer(name, torch.empty(2, dtype=dtype, device="meta"), persistent=False)
    with pytest.raises(CheckpointError, match=r"not compute model\.layers\.1\.counts, model\.layers\.1\.scales, which"):
        architecture.fill_computed_buffers_(model, torch.device("cpu"))


def test_nothing_stays_on_meta(
    small_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_model("LlamaConfig").save_pretrained(tmp_path)
    usual = hub.empty_model

    def with_a_constant(*given: Any) -> Any:
        model: Any = usual(*given)
        model.model.layers[0].offset = torch.ones(2, device="meta")
        return model

    monkeypatch.setattr(hub, "empty_model", with_a_constant)
    with pytest.raises(
        CheckpointError, match=r"1 tensors of this LlamaForCausalLM got no values: model\.layers\.0\.of"
    ):
        load_quantized(tmp_path)


def test_layers_that_share_their_weights_are_loaded_packed(small_model: Callable[..., Any], tmp_path: Path) -> None:
    perturbed(small_model("Zamba2Config", **ZAMBA2)).save_pretrained(tmp_path / "source")
    model = load_quantized(tmp_path / "source", dtype=torch.float32)
    one, other = (model.model.layers[block].shared_transformer.self_attn.q_proj for block in (1, 3))
    assert one is not other and one.weight is other.weight
    save_quantized(model, tmp_path / "packed")
    again = load_quantized(tmp_path / "packed", dtype=torch.float32)
    assert torch.equal(model(TOKENS, use_cache=False).logits, again(TOKENS, use_cache=False).logits)
    one, other = (again.model.layers[block].shared_transformer.self_attn.q_proj for block in (1, 3))
    assert one.weight is other.weight and again.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("family", ["CamembertConfig", "XLMRobertaConfig"])
def test_a_head_declared_before_its_embedding_is_written_as_in_the_source(
    small_model: Callable[..., Any], tmp_path: Path, family: str
) -> None:
    source = tmp_path / "source"
    model = small_model(family, is_decoder=True, max_position_embeddings=40)
    perturbed(model).save_pretrained(source)
    ours = load_quantized(source, PLAIN, dtype=torch.float32)
    add_lora_(ours, LoraConfig(rank=2, target_modules=["query"]))
    nn.init.normal_(next(p for name, p in ours.named_parameters() if name.endswith("lora_B")))
    save_adapter(ours, tmp_path / "adapter")
    export_merged(ours, tmp_path / "memory", dtype=torch.float32)
    export_merged(ours, tmp_path / "original", dtype=torch.float32, base="original")
    merge_checkpoint(source, tmp_path / "adapter", tmp_path / "disk", PLAIN, torch.float32, load_dtype=torch.float32)
    expected = ours(TOKENS, use_cache=False).logits
    for folder in ("memory", "original", "disk"):
        again = load_quantized(tmp_path / folder, PLAIN, dtype=torch.float32)
        torch.testing.assert_close(again(TOKENS, use_cache=False).logits, expected, rtol=1e-4, atol=1e-5)
    packed = load_quantized(source, dtype=torch.float32)
    save_quantized(packed, tmp_path / "packed")
    again = load_quantized(tmp_path / "packed", dtype=torch.float32)
    assert torch.equal(again(TOKENS, use_cache=False).logits, packed(TOKENS, use_cache=False).logits)
    load_adapter_(packed, tmp_path / "adapter")


LLAMA4_TEXT = {"num_local_experts": 2, "intermediate_size_mlp": 48, "interleave_moe_layer_step": 2, "head_dim": 16}
LLAMA4_VISION = {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
LLAMA4_VISION |= {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32, "image_size": 28}


def test_tensors_of_a_vision_tower_are_passed_over_and_listed(tmp_path: Path) -> None:
    """As Llama 4 is published: transformers takes the language model's part, with a warning."""
    import transformers

    text = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, **LLAMA4_TEXT}
    text |= {"num_attention_heads": 2, "num_key_value_heads": 2, "pad_token_id": 0}
    config = transformers.Llama4Config(text_config=text, vision_config={**LLAMA4_VISION, "patch_size": 14})
    perturbed(transformers.Llama4ForConditionalGeneration(config)).save_pretrained(tmp_path)
    ours = load_quantized(tmp_path, PLAIN, dtype=torch.float32, task="causal-lm")
    assert_same(ours, loaded_by_transformers(tmp_path, torch.float32))
    parts = {name.split(".")[0] for name in ours.load_report.passed_over}
    assert type(ours).__name__ == "Llama4ForCausalLM" and parts == {"vision_model", "multi_modal_projector"}
    assert any(line.endswith(": passed over") for line in ours.load_report.in_words())
    for model in (ours, load_quantized(tmp_path, PLAIN, dtype=torch.float32)):  # the whole has the head in a part of it
        hidden, head = architecture.hidden_states(model, {"input_ids": TOKENS}), architecture.output_head(model)
        torch.testing.assert_close(head(hidden), model(TOKENS, use_cache=False).logits)
    assert type(model).__name__ == "Llama4ForConditionalGeneration"
    tensors_on_disk = load_file(tmp_path / "model.safetensors")
    save_file({**tensors_on_disk, "vision_model.stranger": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(
        CheckpointError, match=r"1 tensors belong to no module: vision_model\.stranger; ignore_unexpected"
    ):
        load_quantized(tmp_path, PLAIN, task="causal-lm")


def test_heads_and_buffers_that_a_model_has_no_place_for_are_passed_over_on_request(
    small_model: Callable[..., Any], tmp_path: Path
) -> None:
    source = tmp_path / "source"
    perturbed(small_model("GPT2Config", n_inner=48)).save_pretrained(source)
    before = load_quantized(source, dtype=torch.float32)
    assert before.load_report.passed_over == []
    old = {f"transformer.h.{block}.attn.bias": torch.ones(1, 1, 4, 4) for block in (0, 1)}  # transformers drops these
    extra = {"v_head.summary.weight": torch.ones(1, 32), "v_head.summary.bias": torch.ones(1)}
    save_file({**load_file(source / "model.safetensors"), **old, **extra}, source / "model.safetensors")
    expected = (
        r"2 tensors belong to no module: v_head\.summary\.bias, v_head\.summary\.weight; ignore_unexpected \(--ign"
    )
    with pytest.raises(CheckpointError, match=expected):
        load_quantized(source)
    model = load_quantized(source, dtype=torch.float32, ignore_unexpected=True)
    assert model.load_report.passed_over == sorted(extra)
    assert torch.equal(model(TOKENS).logits, before(TOKENS).logits)
    add_lora_(model, LoraConfig(rank=2, init_lora_weights="pissa"))  # reads the checkpoint again
    save_adapter(model, tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="belong to no module"):
        merge_checkpoint(source, tmp_path / "adapter", tmp_path / "merged")
    done = merge_checkpoint(source, tmp_path / "adapter", tmp_path / "merged", ignore_unexpected=True)
    assert done.passed_over == tuple(sorted(extra))
    assert load_quantized(tmp_path / "merged").load_report.passed_over == []  # the value head is not merged


def test_what_stays_unpacked_is_listed_with_its_bytes(small_model: Callable[..., Any], tmp_path: Path) -> None:
    perturbed(small_model("MambaConfig", state_size=8, time_step_rank=4)).save_pretrained(tmp_path)
    model = load_quantized(tmp_path)
    layer = model.backbone.layers[0].mixer
    assert type(layer.dt_proj) is nn.Linear and type(layer.in_proj).__name__ == "QuantizedLinear"
    assert model.load_report.in_words() == [
        f"2 layers stay unpacked ({2 * layer.dt_proj.weight.nbytes:,} bytes):",
        "  2 x backbone.layers.*.mixer.dt_proj: MambaMixer.forward reads its weight",
    ]
    assert model(TOKENS, use_cache=False).logits.isfinite().all()
    save_quantized(model, tmp_path / "packed")
    again = load_quantized(tmp_path / "packed")
    assert torch.equal(model(TOKENS, use_cache=False).logits, again(TOKENS, use_cache=False).logits)
    assert load_quantized(tmp_path, PLAIN).load_report.in_words() == []


def test_a_config_that_says_something_for_each_layer_is_read(small_model: Callable[..., Any], tmp_path: Path) -> None:
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
    sizes = {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "global_head_dim": 16, **kinds}
    perturbed(small_model("Gemma4TextConfig", **sizes, **GEMMA4)).save_pretrained(tmp_path)
    ours = load_quantized(tmp_path, PLAIN, dtype=torch.float32)
    assert architecture.config_value(ours.config, "num_key_value_heads") is None
    assert architecture.config_value(ours.config, "hidden_size") == 32
    assert_same(ours, loaded_by_transformers(tmp_path, torch.float32))
    add_lora_(ours, LoraConfig(rank=2))
    save_adapter(ours, tmp_path / "adapter")
    load_adapter_(load_quantized(tmp_path, PLAIN), tmp_path / "adapter")


def test_a_scale_of_logits_that_is_a_word_is_left_to_the_model(small_model: Callable[..., Any]) -> None:
    assert architecture.logit_options(small_model("CohereConfig", logit_scale=0.5)) == {"logit_scale": 0.5}
    words = {"logit_scale": "inv_sqrt_d_model", "d_model": 32, "n_heads": 2, "n_layers": 1}
    assert architecture.logit_options(small_model("MptConfig", **words)) == {}


def test_a_text_part_that_automodel_does_not_know_is_loaded_by_the_class_that_its_config_names(tmp_path: Path) -> None:
    import transformers

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "pad_token_id": 0}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "cross_attention_layers": []}
    theirs = perturbed(transformers.MllamaForCausalLM(transformers.MllamaTextConfig(**sizes)).eval())
    theirs.save_pretrained(tmp_path)
    assert_same(load_quantized(tmp_path, PLAIN, dtype=torch.float32), theirs)


@pytest.mark.parametrize("format", ["none", "int8"])
def test_calls_in_eval_leave_the_weights_of_rwkv_as_they_are(
    small_model: Callable[..., Any], tmp_path: Path, format: str
) -> None:
    perturbed(small_model("RwkvConfig", attention_hidden_size=32, rescale_every=1)).save_pretrained(tmp_path)
    ours = load_quantized(tmp_path, QuantConfig(format), dtype=torch.float32)
    before = {name: tensor.clone() for name, tensor in ours.state_dict().items()}
    expected = loaded_by_transformers(tmp_path, torch.float32)(TOKENS, use_cache=False).logits
    tolerance = 1e-4 if format == "none" else 0.05
    torch.testing.assert_close(ours(TOKENS, use_cache=False).logits, expected, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(tensor, before[name]) for name, tensor in ours.state_dict().items())
    assert ours.load_report.left_unpacked == {} and ours.config.rescale_every == 1
