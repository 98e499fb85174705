"""Tests of which layers are packed, and which stay unpacked and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_lite import QuantConfig, quantize_base_
from qlora_lite.errors import TargetError
from qlora_lite.quantization.layers import QuantizedLinear
from qlora_lite.quantization.selection import left_unpacked
from qlora_lite.surgery import has_own_forward

TOKENS = torch.arange(2, 14).view(2, 6)


class Router(nn.Module):
    """Reads the weight of its layer, as LongCat's does."""

    def __init__(self) -> None:
        super().__init__()
        self.classifier = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.classifier.weight.float())


class Model(nn.Module):
    """What transformers keeps in float32 is said by attributes of the model."""

    _keep_in_fp32_modules = ("classifier.weight", "weights_proj")
    _keep_in_fp32_modules_strict = frozenset({"scorer"})

    def __init__(self) -> None:
        super().__init__()
        self.router = Router()
        self.weights_proj, self.scorer, self.scorer_proj = (nn.Linear(64, 64) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.scorer_proj(self.scorer(self.weights_proj(self.router(x))))


def test_each_reason_and_what_is_asked_for_goes_first() -> None:
    model = Model()
    kept = "transformers keeps it in float32"
    expected = {"router.classifier": "Router.forward reads its weight", "weights_proj": kept, "scorer": kept}
    assert left_unpacked(model, QuantConfig()) == expected
    assert left_unpacked(model, QuantConfig(skip_modules=("scorer", "classifier"))) == {"weights_proj": kept}
    assert left_unpacked(model, QuantConfig(format="none")) == {}
    with pytest.raises(TargetError, match=r"skip_modules \['weight'\] matched no layer"):
        left_unpacked(model, QuantConfig(skip_modules=("weight",)))
    x = torch.randn(2, 64)
    before = model(x)
    assert quantize_base_(model, QuantConfig("int8")) == ["scorer_proj"]
    torch.testing.assert_close(model(x), before, rtol=0.1, atol=0.05)


def test_what_is_packed_in_files_is_packed_although_transformers_would_keep_it() -> None:
    model = Model()
    assert left_unpacked(model, QuantConfig(), ["scorer"]).keys() == {"router.classifier", "weights_proj"}
    model.scorer.weight = model.scorer_proj.weight  # one weight, which the files have under the other name
    assert left_unpacked(model, QuantConfig(), ["scorer_proj"]).keys() == {"router.classifier", "weights_proj"}
    assert "router.classifier" in left_unpacked(model, QuantConfig(), ["router.classifier"])  # it could not run


FAMILIES: list[tuple[str, dict[str, Any], set[str]]] = [
    ("MambaConfig", {"state_size": 8}, {"mixer.dt_proj"}),
    ("RwkvConfig", {"attention_hidden_size": 32}, {"attention.output", "feed_forward.value"}),
    ("RwkvConfig", {"attention_hidden_size": 32, "rescale_every": 0}, set()),
    ("BloomConfig", {"n_head": 2}, set()),
    ("PhimoeConfig", {}, {"mlp.router"}),
]


@pytest.mark.parametrize(("family", "sizes", "left"), FAMILIES)
def test_layers_of_families_that_could_not_run_packed(
    small_model: Callable[..., Any], family: str, sizes: dict[str, Any], left: set[str]
) -> None:
    model = small_model(family, **sizes)
    ends = {".".join(name.split(".")[-2:]) for name in left_unpacked(model, QuantConfig())}
    assert ends == left
    quantize_base_(model, QuantConfig())
    assert model(TOKENS, use_cache=False).logits.isfinite().all()


@pytest.mark.parametrize("sizes", [{}, {"new_decoder_architecture": True}, {"multi_query": False, "bias": True}])
def test_falcons_linear_layer_is_packed(sizes: dict[str, Any]) -> None:
    from transformers import FalconConfig, FalconForCausalLM

    config = FalconConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, **sizes)
    model = FalconForCausalLM(config).eval()
    layer = model.transformer.h[0].mlp.dense_h_to_4h
    assert type(layer).__name__ == "FalconLinear" and not has_own_forward(layer)
    before, x = layer(torch.ones(3, 32)), torch.ones(3, 32)
    assert left_unpacked(model, QuantConfig()) == {}
    quantize_base_(model, QuantConfig("int8"))
    packed = model.transformer.h[0].mlp.dense_h_to_4h
    assert isinstance(packed, QuantizedLinear)
    torch.testing.assert_close(packed(x), before, rtol=0.05, atol=0.02)


def test_the_weight_of_a_packed_head_has_the_dtype_of_the_model(small_model: Callable[..., Any]) -> None:
    model = small_model("MambaConfig", state_size=8, tie_word_embeddings=True)
    before = model(TOKENS, use_cache=False).logits
    quantize_base_(model, QuantConfig("int8", embedding_format="int8"))
    # Mamba casts the input of its head to the dtype of the head's weight.
    torch.testing.assert_close(model(TOKENS, use_cache=False).logits, before, rtol=0.1, atol=0.05)
    assert model.lm_head.weight.dtype == torch.float32
    assert model.bfloat16().lm_head.weight.dtype == torch.bfloat16
    assert model(TOKENS, use_cache=False).logits.isfinite().all()
