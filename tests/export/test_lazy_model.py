"""Tests of a model with lazily loaded weights against the same model in memory, for several architectures."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.checkpoints import hub
from qlora_lite.compute.weight_update import Delta
from qlora_lite.errors import ConfigError
from qlora_lite.export.lazy_model import LazyModel, LazyWeights

SMALL = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
CONFIGS = {
    "tied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=True),
    "untied": lambda: transformers.LlamaConfig(**SMALL, tie_word_embeddings=False),
    "biases": lambda: transformers.Qwen2Config(**SMALL),
    "scaled embedding, softcap": lambda: transformers.Gemma2Config(
        **SMALL, head_dim=4, final_logit_softcapping=5.0, query_pre_attn_scalar=4
    ),
    "scaled logits": lambda: transformers.CohereConfig(**SMALL, logit_scale=0.3),
    "divided logits": lambda: transformers.GraniteConfig(**SMALL, logits_scaling=3.0),
    "stacked experts": lambda: transformers.MixtralConfig(**SMALL, num_local_experts=3),
    "conv1d, learned positions": lambda: transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=32
    ),
}


def in_memory(config: Any) -> Any:
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # biases too, which begin at zero
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def sliced(tensor: Tensor) -> Any:
    return lambda: iter(tensor.split(3) if tensor.dim() else [tensor])


def weights_of(model: Any, **deltas: Delta) -> LazyWeights:
    aliases = architecture.tied_names(model)
    tensors = {name: sliced(tensor.clone()) for name, tensor in model.state_dict().items() if name not in aliases}
    return LazyWeights(tensors, {name.replace("__", "."): delta for name, delta in deltas.items()})


def lazy_model(config: Any, weights: LazyWeights) -> LazyModel:
    empty = hub.empty_model(config, torch.float32)
    architecture.tie(empty)
    return LazyModel(empty, weights.tensors)


def logits(model: LazyModel, weights: LazyWeights, batch: dict[str, Tensor], count: int = 7) -> Tensor:
    hidden = model.head_inputs(weights, batch).flatten(0, 1)
    return torch.cat([block for _, block in model.logits(weights, hidden, count)], 1)


BATCH = {
    "input_ids": torch.arange(12).view(2, 6) + 1,
    "attention_mask": torch.tensor([[1] * 6, [1] * 4 + [0] * 2]),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_it_computes_what_the_model_in_memory_does(kind: str) -> None:
    plain = in_memory(CONFIGS[kind]())
    weights = weights_of(plain)
    model = lazy_model(CONFIGS[kind](), weights)
    inside = BATCH["attention_mask"].bool().flatten()
    expected = plain(**BATCH, use_cache=False).logits.flatten(0, 1)
    found = logits(model, weights, BATCH)
    assert found.dtype == torch.float64 and found.std() > 0.01
    torch.testing.assert_close(found[inside].float(), expected[inside], rtol=1e-4, atol=1e-5)
    held = [name for name, tensor in model._model.named_parameters() if not tensor.is_meta]
    assert held == [] and not any("forward" in module.__dict__ for module in model._model.modules())


LLAMA_ADAPTED = ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"]
GPT2_ADAPTED = ["transformer.h.0.mlp.c_fc.weight", "transformer.h.1.attn.c_attn.weight"]


@pytest.mark.parametrize(("kind", "names"), [("untied", LLAMA_ADAPTED), ("conv1d, learned positions", GPT2_ADAPTED)])
def test_updates_apart_are_those_of_the_summed_weights(kind: str, names: list[str]) -> None:
    config = CONFIGS[kind]()
    plain = in_memory(config)
    sizes = {name: plain.get_parameter(name).shape for name in names}
    deltas = {
        name: Delta(torch.randn(rows, 2), torch.randn(2, columns), 0.3) for name, (rows, columns) in sizes.items()
    }
    weights = LazyWeights(weights_of(plain).tensors, deltas)
    model = lazy_model(config, weights)
    without = logits(model, LazyWeights(weights.tensors), BATCH)
    with torch.no_grad():
        for name, delta in deltas.items():
            plain.get_parameter(name).add_(0.3 * delta.left @ delta.right)
    inside = BATCH["attention_mask"].bool().flatten()
    expected = plain(**BATCH).logits.flatten(0, 1)[inside]
    torch.testing.assert_close(logits(model, weights, BATCH)[inside].float(), expected, rtol=1e-4, atol=1e-4)
    assert (without[inside] - expected).abs().max() > 0.1


def test_a_stack_may_come_as_rows_of_its_matrices_and_takes_no_adapter() -> None:
    config = CONFIGS["stacked experts"]()
    plain = in_memory(config)
    weights = weights_of(plain)
    name = next(name for name, tensor in plain.named_parameters() if tensor.dim() == 3)
    rows = plain.get_parameter(name).detach().flatten(0, 1)
    flat = LazyWeights({**weights.tensors, name: sliced(rows)})
    model = lazy_model(config, weights)
    assert torch.equal(logits(model, flat, BATCH), logits(model, weights, BATCH))
    adapted = LazyWeights(weights.tensors, {name: Delta(torch.ones(1, 1), torch.ones(1, 1), 1.0)})
    with pytest.raises(ConfigError, match="has an adapter on a MixtralExperts, which cannot be verified"):
        model.head_inputs(adapted, BATCH)


def test_the_router_of_experts_takes_an_adapter() -> None:
    config = CONFIGS["stacked experts"]()
    plain = in_memory(config)
    name = "model.layers.1.mlp.gate.weight"
    delta = Delta(torch.randn(3, 2), torch.randn(2, 16), 0.5)
    weights = LazyWeights(weights_of(plain).tensors, {name: delta})
    model = lazy_model(config, weights)
    without = logits(model, LazyWeights(weights.tensors), BATCH)
    found = logits(model, weights, BATCH)
    with torch.no_grad():
        plain.get_parameter(name).add_(0.5 * delta.left @ delta.right)
    summed = logits(model, weights_of(plain), BATCH)
    torch.testing.assert_close(found, summed, rtol=1e-4, atol=1e-4)
    assert (without - summed).abs().max() > 0.01


def test_a_module_whose_weight_another_reads_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS["untied"]()
    weights = weights_of(in_memory(config))
    model = lazy_model(config, weights)
    layer = model._model.model.layers[0]
    monkeypatch.setattr(layer.mlp, "forward", lambda x: nn.functional.linear(x, layer.self_attn.o_proj.weight))
    with pytest.raises(ConfigError, match="LlamaForCausalLM cannot be verified: it uses a weight without calling"):
        model.head_inputs(weights, BATCH)


def test_logits_changed_in_an_unknown_way_are_refused() -> None:
    config = CONFIGS["scaled logits"]()
    weights = weights_of(in_memory(config))
    model = lazy_model(config, weights)
    model._options.clear()
    with pytest.raises(ConfigError, match="CohereForCausalLM cannot be verified: it changes its head's logits"):
        model.head_inputs(weights, BATCH)


def test_a_model_without_a_plain_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="plain linear output head can be verified; this head is none"):
        LazyModel(nn.Linear(2, 2), [])
