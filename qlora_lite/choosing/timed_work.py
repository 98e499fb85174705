"""What is timed for each choice: inputs of its class of shapes, and a function for each of its alternatives.

Functions are called with their choice in force, so that they are what training calls. Sizes are such that a dtype takes
about a second on two cores. Attention has the heads of SmolLM2: three query heads share a key head of 64 values.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import cast

import torch
from torch import Tensor

from qlora_lite.choices import (
    ATTENTION_BACKWARD,
    ATTENTION_FORWARD,
    DEFAULTS,
    INTEGER_PRODUCTS,
    NAMES,
    choices_in_force,
)
from qlora_lite.compute.cpu_attention import DTYPE_NAMES, causal_attention
from qlora_lite.quantization.int8_matmul import int8_product

Work = Callable[[], object]


ATTENTION = {"short": (2, 128), "medium": (2, 512), "long": (1, 1280)}  # rows of a batch, and tokens of a row
# Each thread gets a key head, and there are at least as many as in SmolLM2.
KEY_HEADS, GROUP, WIDTH = 3, 3, 64
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}
INTEGER_ROWS, INTEGER_FEATURES = 64, 256


def _random(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _attention(shapes: str, generator: torch.Generator) -> list[Tensor]:
    """Returns Q, K and V of a class, laid out as models make them."""
    dtype, length = shapes.split(".")
    rows, tokens = ATTENTION[length]
    key_heads = max(KEY_HEADS, torch.get_num_threads())
    heads = (GROUP * key_heads, key_heads, key_heads)
    made = (_random(generator, rows, tokens, count, WIDTH).to(DTYPES[dtype]).transpose(1, 2) for count in heads)
    return [tensor.requires_grad_() for tensor in made]


def _attended(tensors: list[Tensor]) -> Tensor:
    query, key, value = tensors
    return causal_attention(query, key, value, WIDTH**-0.5)


def _attend(tensors: list[Tensor]) -> Tensor:
    with torch.no_grad():
        return _attended(tensors)


def _attend_back(out: Tensor, tensors: list[Tensor]) -> object:
    return torch.autograd.grad(out, tensors, out.detach(), retain_graph=True)


def _chosen(key: str, name: str, work: Work) -> object:
    with choices_in_force({**DEFAULTS, key: name}):
        return work()


def _attention_work(shapes: str, generator: torch.Generator) -> Iterator[tuple[str, dict[str, Work]]]:
    tensors = _attention(shapes, generator)
    key = f"{ATTENTION_FORWARD}.{shapes}"
    forward = functools.partial(_attend, tensors)
    yield key, {name: functools.partial(_chosen, key, name, forward) for name in NAMES[key]}
    key = f"{ATTENTION_BACKWARD}.{shapes}"
    backward: dict[str, Work] = {}
    for name in NAMES[key]:
        out = cast(Tensor, _chosen(key, name, functools.partial(_attended, tensors)))
        backward[name] = functools.partial(_attend_back, out, tensors)
    yield key, backward


def timed_work(dtype: str) -> Iterator[tuple[str, dict[str, Work]]]:
    """Yields each key of a dtype, `bf16` or `fp32`, with a function for each of its alternatives.

    Inputs exist until the next key is asked for. Random numbers come from a generator of their own.
    """
    generator = torch.Generator().manual_seed(0)
    x = _random(generator, INTEGER_ROWS, INTEGER_FEATURES)
    codes = torch.randint(-127, 128, (INTEGER_FEATURES, INTEGER_FEATURES), generator=generator, dtype=torch.int8)
    product = functools.partial(int8_product, x, codes, torch.ones(INTEGER_FEATURES))
    names = NAMES[INTEGER_PRODUCTS]
    yield INTEGER_PRODUCTS, {name: functools.partial(_chosen, INTEGER_PRODUCTS, name, product) for name in names}
    for length in ATTENTION:
        yield from _attention_work(f"{dtype}.{length}", generator)
