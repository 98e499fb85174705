"""NEFTune (arXiv:2310.05914): uniform noise on the embeddings of tokens, in training mode only.

    e' = e + u,    u ~ Uniform(-a, a),    a = alpha / sqrt(L * d)

e: (rows, L, d), the output of the input embedding, of rows of L tokens, padding and packed examples included, as in
transformers' Trainer. The noise comes from torch's generator, whose state a resumed run restores.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.errors import ConfigError


def _with_noise(alpha: float, module: nn.Module, args: object, output: Tensor) -> Tensor:
    if not module.training:
        return output
    largest = alpha / math.sqrt(output.shape[-2] * output.shape[-1])
    return output + torch.empty_like(output).uniform_(-largest, largest)


@contextmanager
def noisy_embeddings(model: nn.Module, alpha: float | None) -> Iterator[None]:
    """Within the block the input embedding of a model adds noise in training mode; with None nothing is changed.

    Of an encoder-decoder whose two sides share the embedding, both get noise.
    Raises ConfigError for a model that does not name its input embedding.
    """
    if alpha is None:
        yield
        return
    embedding = architecture.input_embedding(model)
    if embedding is None:
        raise ConfigError(f"a {type(model).__name__} names no input embedding; leave out neftune_noise_alpha")
    with embedding.register_forward_hook(functools.partial(_with_noise, alpha)):
        yield
