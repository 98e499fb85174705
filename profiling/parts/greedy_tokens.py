"""Whether a packed model generates the tokens of its dequantized weights, up to ties within the noise of bf16."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized
from qlora_lite.checkpoints import load_tokenizer
from qlora_lite.generation import decode_copies
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.quantization.layers import QuantizedLinear
from qlora_lite.surgery import replace_modules_

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "Once upon a time there was a",
    "def fibonacci(n):",
    "The three primary colours are",
    "To bake a loaf of bread, you need",
    "In the year 1969, people",
    "The opposite of cold is",
    "A list of the planets, from the sun outwards:",
    "My favourite book is about",
)
CHECKED_TOKENS, TINY_TOKENS = 64, 12
# Adapters that change what is written without making it noise.
ADAPTER_STD = 0.01


class Difference(NamedTuple):
    """The first token in which two models differ.

    gap: by how much the logit of the reference's token is above that of the other token, in fp32. noise: the largest
    difference between the reference's logits in bf16 and in fp32, for this token.
    """

    step: int
    gap: float
    noise: float

    @property
    def tied(self) -> bool:
        return self.gap <= 2 * self.noise


def _plain_layer(name: str, layer: nn.Module) -> nn.Module | None:
    if not isinstance(layer, QuantizedLinear):
        return None
    linear = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(layer.weight.dequantize(torch.bfloat16), requires_grad=False)
    linear.bias = layer.bias
    return linear


def dequantized_model(model: nn.Module) -> Any:
    """Returns a copy of a packed model with plain linear layers, in bf16."""
    plain = copy.deepcopy(model)
    replace_modules_(plain, _plain_layer)
    return plain


def greedy_tokens(model: Any, prompt: Tensor, count: int) -> Tensor:
    """Returns the `count` tokens that a model finds likeliest after a prompt `(1, tokens)`."""
    mask = torch.ones_like(prompt)
    made: Tensor = model.generate(
        prompt, attention_mask=mask, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return made[0, prompt.shape[1] :]


@torch.no_grad()
def first_difference(model: Any, reference: Any, exact: Any, prompt: Tensor, count: int) -> Difference | None:
    """Returns where the greedy tokens of model and reference part, None if they do not.

    exact: the reference in fp32.
    """
    ours, theirs = (greedy_tokens(one, prompt, count) for one in (model, reference))
    parted = (ours != theirs).nonzero()
    if not len(parted):
        return None
    step = int(parted[0])
    before = torch.cat((prompt, theirs[None, :step]), dim=1)
    rounded, logits = (one(before).logits[0, -1].float() for one in (reference, exact))
    gap = float(logits[theirs[step]] - logits[ours[step]])
    return Difference(step, gap, float((rounded - logits).abs().max()))


def check_greedy_tokens(folder: Path, format: str, tiny: bool) -> dict[str, Any]:
    """Returns in how many answers a packed model with adapters and its dequantized copy agree, and where they part."""
    tokenizer = load_tokenizer(folder)
    model = load_quantized(folder, QuantConfig(format=format))
    add_lora_(model, LoraConfig(rank=8, alpha=16))
    generator = torch.Generator().manual_seed(0)
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            layer.lora_B.data.normal_(0, ADAPTER_STD, generator=generator)
    reference = dequantized_model(model.eval())
    exact = copy.deepcopy(reference).float()
    count = TINY_TOKENS if tiny else CHECKED_TOKENS
    with decode_copies(model) as copied:
        prompts = [tokenizer(text, return_tensors="pt")["input_ids"] for text in PROMPTS]
        found = [first_difference(model, reference, exact, prompt, count) for prompt in prompts]
    parted = [difference for difference in found if difference is not None]
    return {
        "prompts": len(PROMPTS),
        "tokens": count,
        "copied": copied,
        "equal": found.count(None),
        "tied": sum(difference.tied for difference in parted),
        "wrong": [difference._asdict() for difference in parted if not difference.tied],
    }
