"""Pairs of models for peft_matrix.py: peft's API here on a packed base, and real peft on the same weights unpacked."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

from qlora_lite import QuantConfig, quantize_base_
from qlora_lite.compute.products.frozen_weight import dequantized
from qlora_lite.errors import ConfigError
from qlora_lite.integrations import get_peft_model
from qlora_lite.quantization.experts import RoutedExperts
from qlora_lite.quantization.layers import QuantizedEmbedding, QuantizedLinear
from qlora_lite.surgery import replace_modules_

TOLERANCE = 1e-5
BASES = ("nf4", "fp4", "int8")
SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "initializer_range": 0.15,
    "attention_dropout": 0.0,
}
TOKENS = torch.arange(3, 19).view(2, 8)


EXPERTS = {"num_local_experts": 3, "num_experts_per_tok": 2, "tie_word_embeddings": False}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", {}),  # some of its layers have a bias
    "mixtral": ("MixtralConfig", EXPERTS),
    "gpt_oss": ("GptOssConfig", {**EXPERTS, "head_dim": 16}),  # stacks (in, out), with a bias
}
# Entries of the settings of a case that choose its base.
OF_BASE = ("family", "embedding")


@functools.cache
def _base(format: str, embedding: str, family: str) -> Any:
    torch.manual_seed(0)
    name, sizes = FAMILIES[family]
    config = getattr(transformers, name)(**{**SIZES, "tie_word_embeddings": embedding != "none", **sizes})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    quantize_base_(model, QuantConfig(format=format, embedding_format=embedding))
    return model


def packed_model(format: str, embedding: str = "none", family: str = "qwen2", **settings: Any) -> Any:
    """Returns a new packed model, equal in each call. With a packed embedding, its head is tied to it."""
    return copy.deepcopy(_base(format, embedding, family))


def _plain_layer(name: str, module: Any) -> nn.Module | None:
    """Returns a plain layer in place of a packed one, None for other modules."""
    if isinstance(module, RoutedExperts):
        for stack in module.stack_names:
            values = nn.Parameter(getattr(module, stack).dequantize(torch.float32), requires_grad=False)
            delattr(module, stack)
            module.register_parameter(stack, values)
        return module.as_plain()
    if not isinstance(module, (QuantizedLinear, QuantizedEmbedding)):
        return None
    weight = nn.Parameter(dequantized(module.weight, torch.float32), requires_grad=False)
    if isinstance(module, QuantizedEmbedding):
        return nn.Embedding(*weight.shape, padding_idx=module.padding_idx, _weight=weight)
    made = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
    made.weight, made.bias = weight, module.bias
    return made


def unpacked(model: Any) -> Any:
    """Returns a copy of a packed model with plain layers that hold the unpacked weights. Nothing is tied."""
    other = copy.deepcopy(model)
    replace_modules_(other, _plain_layer)
    other.config.tie_word_embeddings = False
    return other


def fill_(model: Any, seed: int = 0) -> Any:
    """Gives trained parameters values that depend on their names alone, and returns the model."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            generator = torch.Generator().manual_seed(seed + sum(map(ord, name)))
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = parameter.data * (1 + 0.2 * noise) if "magnitude" in name else 0.3 * noise
    return model


@dataclass
class Pair:
    """`ours` on the packed base and `theirs` on the unpacked one, with equal values in the adapters."""

    ours: Any
    theirs: Any

    @property
    def both(self) -> tuple[Any, Any]:
        return self.ours, self.theirs

    def fill_(self, seed: int = 0) -> None:
        """Gives both the same new values."""
        for model in self.both:
            fill_(model, seed)

    def add_(self, name: str, seed: int = 1, **settings: Any) -> None:
        """Adds an adapter with values to both, which stays switched off."""
        active = self.ours.active_adapter
        for model in self.both:
            model.add_adapter(name, config(**settings))
            model.set_adapter(name)
            fill_(model, seed)
            model.set_adapter(active)


def config(**settings: Any) -> peft.LoraConfig:
    """Returns peft's configuration with the defaults of these cases."""
    defaults = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return peft.LoraConfig(**defaults | settings)


def pair(format: str, **settings: Any) -> Pair:
    """Returns a pair with one adapter, whose parameters have values that are not those of the start."""
    base = packed_model(format, **settings)
    of_adapter = {name: value for name, value in settings.items() if name not in OF_BASE}
    theirs = peft.get_peft_model(unpacked(base), config(**of_adapter))
    made = Pair(get_peft_model(base, config(**of_adapter)), theirs)
    made.fill_()
    return made


def difference(found: Tensor, expected: Tensor) -> float:
    """Returns the largest difference in units of the largest expected value; NaN where there is one."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-6))


def logits(model: Any, **options: Any) -> Tensor:
    """Returns the logits of a model in eval mode."""
    with torch.no_grad():
        return model.eval()(TOKENS, **options).logits


def check_equal(found: Tensor, expected: Tensor, what: str = "logits", tolerance: float = TOLERANCE) -> None:
    """Raises AssertionError unless two tensors agree."""
    distance = difference(found, expected)
    assert distance <= tolerance, f"{what} differ by {distance:.2g}"


def check_differ(found: Tensor, other: Tensor, what: str) -> None:
    """Raises AssertionError if two tensors agree: what should have had an effect had none."""
    assert difference(found, other) > 100 * TOLERANCE, f"{what} changed nothing"


def check_refused(call: Callable[..., object], *words: str, **options: Any) -> None:
    """Raises AssertionError unless a call raises a ConfigError that has these words."""
    try:
        call(**options)
    except ConfigError as error:
        missing = [word for word in words if word not in str(error)]
        if missing:
            raise AssertionError(f"{error} does not say {missing}") from error
        return
    raise AssertionError(f"{call} was not refused")


def check_same(found: Pair) -> Tensor:
    """Raises AssertionError unless both models of a pair compute the same. Returns our logits."""
    ours = logits(found.ours)
    check_equal(ours, logits(found.theirs))
    return ours


def gradients(model: Any) -> dict[str, Tensor]:
    """Returns the gradients of the trained parameters by name."""
    model.eval().zero_grad()
    model(input_ids=TOKENS, labels=TOKENS).loss.backward()
    return {name: value.grad for name, value in model.named_parameters() if value.grad is not None}


def check_gradients(found: Pair) -> None:
    """Raises AssertionError unless both train the same parameters, with the same gradients."""
    trained = [{name for name, value in model.named_parameters() if value.requires_grad} for model in found.both]
    assert trained[0] == trained[1], f"trained parameters differ: {sorted(trained[0] ^ trained[1])}"
    ours, theirs = map(gradients, found.both)
    assert ours.keys() == theirs.keys() == trained[0]
    for name, expected in theirs.items():
        check_equal(ours[name], expected, f"gradients of {name}")
