"""The configs of family_models.py: sizes by the names of entries, and what single families need besides.

`name+shape` is a further shape of a family, `name@whole` the multimodal model that its language model is part of.
"""

from __future__ import annotations

import re
from typing import Any

VOCABULARY = 256
_NAMES = {
    VOCABULARY: "vocab_size vocab_size_per_layer_input unpadded_vocab_size decoder_vocab_size",
    64: "hidden_size d_model n_embd embedding_dim emb_dim word_embed_proj_dim lru_width attention_hidden_size "
    "max_position_embeddings n_positions n_ctx max_seq_len context_length max_target_positions max_source_positions "
    "model_max_length original_max_position_embeddings",
    32: "embedding_size input_embedding_size dim_model_base global_head_dim",
    48: "output_embedding_size expert_ffn_hidden_size moe_intermediate_size",
    96: "n_inner intermediate_size ffn_dim dff d_inner dim_ff ffn_hidden_size decoder_ffn_dim encoder_ffn_dim "
    "feed_forward_size",
    112: "intermediate_size_mlp dense_intermediate_size prefix_dense_intermediate_size",
    40: "shared_expert_intermediate_size moe_shared_expert_intermediate_size shared_experts_intermediate_size "
    "shared_intermediate_size",
    128: "mamba_d_ssm",
    24: "q_lora_rank qk_head_dim",
    16: "head_dim attention_head_size attention_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim "
    "kv_lora_rank o_lora_rank qk_nope_head_dim v_head_dim index_head_dim hidden_size_per_layer_input hc_lowrank "
    "mamba_d_state mamba_d_head mamba_head_dim mamba_headdim ssm_state_size state_size router_hidden_size "
    "swa_head_dim kv_channels dim_head d_head query_pre_attn_scalar local_attention block_multiple_of rel_extent "
    "ple_embed_dim",
    8: "qk_rope_head_dim index_topk laurel_rank gated_norm_rank adapter_rank mamba_n_heads mamba_num_heads "
    "mamba_chunk_size mamba_dt_rank time_step_rank chunk_size block_size rotary_dim sliding_window "
    "attention_window_size sliding_window_size attention_chunk_size window_size keep_window_size d_rel",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads linear_num_heads "
    "linear_num_value_heads num_experts n_routed_experts num_local_experts moe_num_experts",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers "
    "num_decoder_layers num_blocks depth num_query_groups linear_num_key_heads zero_expert_num num_experts_per_tok "
    "num_experts_per_token moe_topk moe_top_k moe_k top_k_experts index_n_heads n_mamba_heads n_groups type_vocab_size "
    "num_key_value_heads swa_num_key_value_heads num_kv_heads kv_n_heads",
    1: "num_global_key_value_heads n_group topk_group num_expert_group n_shared_experts num_shared_experts "
    "moe_num_shared_experts first_k_dense_replace num_dense_layers",
    0: "mem_len",
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
DROPOUTS = re.compile(r"(dropout|drop|pdrop)(_p|_prob|_rate)?$|^(attn|resid|embd|emb)_pdrop$|layerdrop$|jitter_noise$")
TOKEN_IDS = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "cls_token_id": 1,
    "decoder_start_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 2,
    "eod_token_id": 2,
    "mask_token_id": 3,
    "image_token_id": 5,
    "image_token_index": 5,
    "video_token_id": 6,
    "audio_token_id": 7,
    "vision_start_token_id": 8,
    "boi_token_id": 8,
    "boi_token_index": 8,
    "vision_end_token_id": 9,
    "eoi_token_id": 9,
    "eoi_token_index": 9,
    "boa_token_id": 10,
    "eoa_token_id": 11,
    "eoa_token_index": 11,
    "forced_eos_token_id": None,
    "begin_suppress_tokens": None,
    "suppress_tokens": None,
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# One value for each layer; a config computes these anew when they are left out.
PER_LAYER = _words(
    "layer_types mlp_layer_types indexer_types no_rope_layers moe_layers layer_rope_theta attention_layers "
    "num_attention_heads_per_layer full_attn_idxs activation_sparsity_pattern per_layer_config mlp_only_layers "
    "layers_block_type block_types hybrid_layer_ids"
)
# Language models only if their config says so.
ENCODERS = _words(
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert roberta "
    "roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl xmod reformer bigbird_pegasus"
)
LEFT_OUT = object()  # in FAMILIES: the entry keeps the config's own value
MLA_SWA = {
    "num_key_value_heads": 4,
    "head_dim": 24,
    "swa_num_attention_heads": 2,
    "swa_num_key_value_heads": 2,
    "swa_q_lora_rank": 20,
    "swa_kv_lora_rank": 12,
    "swa_head_dim": 24,
    "swa_qk_nope_head_dim": 16,
    "swa_v_head_dim": 16,
}
GEMMA3N = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
    "intermediate_size": 96,
}
QWEN4 = {
    "eos_token_id": 2,
    "pad_token_id": 0,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 50,
    "split_ngram_parts": 2,
    "make_ngram_vocab_size_divisible_by": 8,
    "ple_layer_ids": [1],
    "heads_per_ngram": 2,
}
ZAMBA = {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "num_key_value_heads": 4}
EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "first_k_dense_replace": 1}
LLAMA4 = {"interleave_moe_layer_step": 2, "no_rope_layer_interval": 2}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
LONG_FACTORS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "factor": 1.0}
# Entries by family. `family:part` is a part of a config, `family!default` what the plain class cannot be built without.
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {"global_attn_every_n_layers": 2},
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 97},
    "blt:encoder_config": {"hidden_size_global": 64, "intermediate_size": 96, "num_key_value_heads": 4},
    "blt:decoder_config": {"hidden_size_global": 64, "num_key_value_heads": 4},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {**ROPE, "mrope_section": [4, 2, 2]}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": {**EXPERTS, "n_group": 1, "topk_group": 1},
    "dots1": {**EXPERTS, "n_shared_experts": 1},
    "dots3_note_text": MLA_SWA,
    "dots3_note:text_config": MLA_SWA,
    "dots3_note:vision_config": {"adapter_out_dim": 64, "adapter_in_dim": 64},
    "dots3_note:audio_config": {"adapter_out_dim": 64, "adapter_input_size": 64},
    "emu3": {"vocabulary_map": {"<image>": 5, "<|visual token 000000|>": 20, "<|visual token 000001|>": 21}},
    "gemma3n_text": GEMMA3N,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16, "num_experts": 4, "moe_topk": 2},
    "jamba": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": LLAMA4,
    "llama4:text_config": LLAMA4,
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": 16},
    "mpt:attn_config": {"attn_pdrop": 0},
    "nemotron": {"num_key_value_heads": 2},
    "qwen2_moe": {"mlp_only_layers": [0]},
    "qwen3_moe": {"mlp_only_layers": [0]},
    "qwen4_exp_text": QWEN4,
    "qwen4_exp:text_config": QWEN4,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {
        "axial_pos_embds_dim": [32, 32],
        "axial_pos_shape": [4, 4],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "hash_seed": 0,
        "num_buckets": 2,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 100,
        "shape_vocab_size": 100,
        "pronunciation_embed_dim": 32,
        "shape_embed_dim": 32,
    },
    "smollm3": {"no_rope_layer_interval": 2},
    "xlm": {"causal": True},
    "xlnet": {"attn_type": "uni"},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**ZAMBA, "attention_hidden_size": 128, "attention_head_dim": 32},
    "zamba2": {
        **ZAMBA,
        "n_mamba_heads": 4,
        "attention_hidden_size": LEFT_OUT,
        "attention_head_dim": LEFT_OUT,
        "mamba_headdim": LEFT_OUT,
        "kv_channels": LEFT_OUT,
        "num_query_groups": LEFT_OUT,
    },
}
# Further shapes of families, as checkpoints of them have.
SHAPES: dict[str, dict[str, Any]] = {
    "bert+encoder": {"is_decoder": False},
    "bloom+untied": {"tie_word_embeddings": False},
    "deepseek_v3+noq": {"q_lora_rank": None},
    "falcon+alibi": {"alibi": True, "parallel_attn": False, "multi_query": False, "bias": True, "num_kv_heads": 4},
    "falcon+new": {"new_decoder_architecture": True},
    "gemma4_text+keqv": {"attention_k_eq_v": True},
    "gpt2+untied": {"tie_word_embeddings": False},
    "gpt_bigcode+multihead": {"multi_query": False},
    "gpt_neox+serial": {"use_parallel_residual": False},
    "granite+tied": {"tie_word_embeddings": True},
    "llama+bias": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mixtral+routers": {"output_router_logits": True},
    "mpt+scale": {"logit_scale": "inv_sqrt_d_model"},
    "opt+350m": {"do_layer_norm_before": False, "word_embed_proj_dim": 32},
    "phi3+long": {"rope_parameters": {**ROPE, "rope_type": "longrope", **LONG_FACTORS}},
    "qwen2_moe+routers": {"mlp_only_layers": [], "output_router_logits": True},
    "qwen3_moe+sparse": {"mlp_only_layers": []},
    "rwkv+rescale": {"num_hidden_layers": 7},
    "stablelm+qknorm": {"qk_layernorm": True, "use_parallel_residual": True, "use_qkv_bias": True},
    "xlm+bidirectional": {"causal": False},
    "xlnet+bidirectional": {"attn_type": "bi"},
}
WHOLE = {
    "llama4@whole": "Llama4ForConditionalGeneration",
    "mllama@whole": "MllamaForConditionalGeneration",
    "qwen3_5@whole": "Qwen3_5ForConditionalGeneration",
    "qwen3_5_moe@whole": "Qwen3_5MoeForConditionalGeneration",
    "qwen4_exp@whole": "Qwen4ExpForConditionalGeneration",
}
# Why transformers itself does not build these, or does not load them again.
WHY_NOT_BUILT = {
    "emu3": "AutoModelForCausalLM does not know its text part once it is saved",
    "gemma3n": "its vision tower needs timm",
    "gemma4_assistant": "needs hidden states and shared keys of another model",
    "gemma4_unified_assistant": "needs hidden states and shared keys of another model",
    "mllama": "AutoModelForCausalLM does not know its text part once it is saved",
    "musicgen": "AutoModelForCausalLM.from_config fails for its config",
    "musicgen_melody": "AutoModelForCausalLM.from_config fails for its config",
}
