"""Tests of the choice of the loss."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized
from qlora_lite.errors import ConfigError
from qlora_lite.planning.rehearsal import fake_tensors
from qlora_lite.training.objective.choice import choose_loss
from qlora_lite.training.objective.losses import FROM_LOGITS, LOGIT_FREE, LOSSES, OF_MODEL

IDS = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
BATCH = {"input_ids": IDS, "labels": IDS}


def of_logits(model: Any) -> torch.Tensor:
    logits = model(input_ids=IDS, use_cache=False).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum")


def louder(model: Any, factor: float = 20) -> Any:
    """The model with a head of larger weights, so that its logits differ from each other."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(factor)
    return model.requires_grad_(False)


DECODER = {"d_model": 32, "decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 48}
BERT = {"is_decoder": True}


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("BartConfig", DECODER),
        ("MarianConfig", {**DECODER, "decoder_vocab_size": 64}),
        ("PegasusConfig", DECODER),
        ("WhisperConfig", DECODER),
        ("TrOCRConfig", DECODER),
        ("XLNetConfig", {"d_model": 32, "n_layer": 1, "n_head": 2, "d_inner": 48, "attn_type": "uni"}),
    ],
)
def test_models_whose_own_loss_rewards_a_copy_are_trained_on_the_next_token(
    small_model: Callable[..., Any], family: str, sizes: dict[str, Any]
) -> None:
    model = louder(small_model(family, **sizes))
    expected = of_logits(model)
    assert abs(model(**BATCH).loss * 22 - expected) > 0.1 * expected
    assert choose_loss(model, BATCH) == (LOGIT_FREE, None)
    torch.testing.assert_close(LOSSES[LOGIT_FREE](model, BATCH), expected, rtol=1e-5, atol=1e-4)


SCALED = {
    "Gemma2Config": {"final_logit_softcapping": 0.5},
    "CohereConfig": {"logit_scale": 0.3},
    "GraniteConfig": {"logits_scaling": 4.0},
    "HyperCLOVAXConfig": {"logits_scaling": 4.0},
    "FalconH1Config": {"lm_head_multiplier": 0.2, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "RecurrentGemmaConfig": {"logits_soft_cap": 0.5, "lru_width": 32, "num_hidden_layers": 3},
}


@pytest.mark.parametrize("family", SCALED)
def test_models_that_change_their_logits(small_model: Callable[..., Any], family: str) -> None:
    model = louder(small_model(family, **SCALED[family]))
    assert choose_loss(model, BATCH) == (LOGIT_FREE, None)
    torch.testing.assert_close(LOSSES[LOGIT_FREE](model, BATCH), of_logits(model), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("factor", [1e-3, 1, 1e3])
def test_models_that_are_sure_of_their_answers_need_no_logits_either(
    small_model: Callable[..., Any], factor: float
) -> None:
    """The losses of the likeliest tokens are rounding errors there: their ratio says nothing."""
    model = louder(small_model("BioGptConfig"), factor)
    assert choose_loss(model, BATCH) == (LOGIT_FREE, None)


def scaled_behind_the_head(model: Any) -> Any:
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: 1.01 * out)
    return model


@pytest.mark.parametrize("factor", [0.1, 1, 1e3])
def test_what_is_done_to_the_logits_is_seen_whatever_their_size(small_model: Callable[..., Any], factor: float) -> None:
    model = scaled_behind_the_head(louder(small_model("LlamaConfig"), factor))
    chosen, reason = choose_loss(model, BATCH)
    assert chosen == FROM_LOGITS
    assert str(reason).startswith("on a probe the loss of its logits is ")
    torch.testing.assert_close(LOSSES[chosen](model, BATCH), of_logits(model))


MLA = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
NOT_PLAIN = [
    ("BertConfig", BERT, "on a probe the loss of its logits is"),
    ("ElectraConfig", {**BERT, "embedding_size": 16}, "its output head takes 16 features, and its last hidden states"),
    ("RemBertConfig", {**BERT, "output_embedding_size": 24}, "its output head takes 24 features, and its last hidden"),
    ("RoFormerConfig", {**BERT, "embedding_size": 16}, "its output head takes 16 features, and its last hidden states"),
]


@pytest.mark.parametrize(("family", "sizes", "says"), NOT_PLAIN)
def test_models_whose_heads_are_not_one_matrix_take_their_logits(
    small_model: Callable[..., Any], family: str, sizes: dict[str, Any], says: str
) -> None:
    model = small_model(family, **sizes).requires_grad_(False)
    chosen, reason = choose_loss(model, BATCH)
    assert chosen == FROM_LOGITS and says in str(reason)
    torch.testing.assert_close(LOSSES[chosen](model, BATCH), of_logits(model))


@pytest.mark.parametrize(
    ("family", "sizes", "chosen"),
    [
        *((family, sizes, FROM_LOGITS) for family, sizes, _ in NOT_PLAIN),
        *((family, sizes, LOGIT_FREE) for family, sizes in SCALED.items()),
        ("LlamaConfig", {}, LOGIT_FREE),
        ("Llama4TextConfig", {"intermediate_size_mlp": 48}, LOGIT_FREE),  # it names its base by another word
        ("BartConfig", DECODER, LOGIT_FREE),  # its hidden states come from a part of the model's base
        ("FalconMambaConfig", {"dtype": torch.bfloat16}, LOGIT_FREE),  # its head gets a copy in another dtype
        ("MiniCPM3Config", MLA | {"dim_model_base": 16}, LOGIT_FREE),  # the scale is applied to what its head gets
    ],
)
def test_a_rehearsal_chooses_the_same(
    small_model: Callable[..., Any], family: str, sizes: dict[str, Any], chosen: str
) -> None:
    seen = []
    with fake_tensors():
        model = small_model(family, **sizes)
        model.get_input_embeddings().register_forward_hook(lambda module, args, out: seen.append(out.shape))
        ids = torch.zeros(2, 12, dtype=torch.int64)
        choices = [choose_loss(model, {"input_ids": ids, "labels": ids}) for _ in range(2)]
    assert choices[0] == choices[1] and choices[0][0] == chosen
    assert len(seen) <= 2  # the second time, nothing is run


def test_the_reason_for_the_logits_is_given(tiny_folder: Path) -> None:
    class Louder(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    model: Any = load_quantized(tiny_folder, QuantConfig())
    assert choose_loss(model, BATCH) == (LOGIT_FREE, None)
    model.lm_head = Louder(64, model.config.vocab_size)
    assert choose_loss(model, BATCH) == (FROM_LOGITS, "its output head is a Louder")
    model.get_output_embeddings = lambda: None
    assert choose_loss(model, BATCH) == (FROM_LOGITS, "the model does not say which module is its output head")
    model = load_quantized(tiny_folder, QuantConfig())
    add_lora_(model, LoraConfig(target_modules=["lm_head"], dropout=0.1))
    assert choose_loss(model, BATCH) == (FROM_LOGITS, "the adapter of its output head has dropout")


def test_a_base_that_does_not_run_alone_is_a_reason(small_model: Callable[..., Any]) -> None:
    model = small_model("LlamaConfig")
    base, head = model.model.forward, model.forward

    def only_inside(**inputs: Any) -> Any:
        if not inside:
            raise TypeError("missing: a mask\nand more")
        return base(**inputs)

    def whole(**inputs: Any) -> Any:
        inside.append(True)
        try:
            return head(**inputs)
        finally:
            inside.clear()

    inside: list[bool] = []
    model.model.forward, model.forward = only_inside, whole
    chosen, reason = choose_loss(model, BATCH)
    assert chosen == FROM_LOGITS
    assert reason == "the part of it that computes hidden states does not run alone (TypeError: missing: a mask)"


def test_a_loss_on_the_logits_that_the_config_asks_for_is_that_of_the_model(small_model: Callable[..., Any]) -> None:
    sizes = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
    model = small_model("BambaConfig", z_loss_coefficient=0.5, **sizes)
    chosen, reason = choose_loss(model, BATCH)
    assert chosen == OF_MODEL and "(z_loss_coefficient 0.5)" in str(reason)
    size = model(input_ids=IDS, use_cache=False).logits.logsumexp(-1).pow(2).mean()
    torch.testing.assert_close(LOSSES[chosen](model, BATCH), of_logits(model) + 22 * 0.5 * size)
    assert choose_loss(small_model("BambaConfig", **sizes), BATCH) == (LOGIT_FREE, None)


def test_a_model_without_logits_is_refused(small_model: Callable[..., Any]) -> None:
    model = small_model("LlamaConfig")
    model.forward = lambda **inputs: torch.zeros(3)
    with pytest.raises(ConfigError, match="returns no logits for input_ids of shape"):
        choose_loss(model, BATCH)


def test_modes_and_random_states_stay_as_they_were(small_model: Callable[..., Any]) -> None:
    model = small_model("LlamaConfig", attention_dropout=0.5)
    model.train()
    model.model.layers[0].eval()
    model.model.embed_tokens.register_forward_hook(lambda module, args, out: out + 0 * torch.rand(1) * random.random())
    before = [module.training for module in model.modules()]
    states = torch.get_rng_state(), random.getstate()
    assert choose_loss(model, BATCH) == (LOGIT_FREE, None)
    assert [module.training for module in model.modules()] == before
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
