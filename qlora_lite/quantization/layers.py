"""Layers around a `PackedWeight`: a linear layer and an embedding.

Neither keeps an unpacked weight: `QuantizedLinear` unpacks W0 for each product, in slices of rows where it is large,
and `QuantizedEmbedding` unpacks the rows of the tokens that it gets.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qlora_lite.compute.lora_linear import adapted_linear, check_features
from qlora_lite.errors import InputError, QuantizationError
from qlora_lite.quantization.formats import either, embedding_formats, format_named
from qlora_lite.quantization.packed_weight import PackedWeight


class QuantizedLinear(nn.Module):
    """y = W0 x + bias with W0 `(out, in)` packed and frozen; x `(..., in)`, y `(..., out)` in the dtype of x.

    compute_dtype: of the product (None: see `product_dtype`). Gradients: x and bias.
    transposed: whether the plain layer holds W0 as `(in, out)`, as GPT-2's Conv1D does; an export writes it so.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: PackedWeight,
        bias: nn.Parameter | None = None,
        compute_dtype: torch.dtype | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.compute_dtype, self.transposed = compute_dtype, transposed
        self.weight = weight
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        check_features(x, self.in_features)
        return adapted_linear(x, self.weight, self.bias, compute_dtype=self.compute_dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class QuantizedEmbedding(nn.Module):
    """y_t = W[token_t] with W `(num_embeddings, embedding_dim)` packed by rows and frozen.

    tokens `(...)`, int64 or int32 -> `(..., embedding_dim)` in `dtype`. A tied output head holds the same
    `PackedWeight` module. Raises QuantizationError for a format that does not store rows apart, and InputError for
    tokens outside of the vocabulary.
    """

    def __init__(self, weight: PackedWeight, dtype: torch.dtype, padding_idx: int | None = None) -> None:
        super().__init__()
        if not format_named(weight.format).holds_embeddings:
            formats = either(*embedding_formats())
            raise QuantizationError(f"an embedding is packed by rows, as {formats}; got {weight.format}")
        self.num_embeddings, self.embedding_dim = weight.shape
        self.output_dtype = dtype
        self.padding_idx = padding_idx
        self.weight = weight

    def forward(self, tokens: Tensor) -> Tensor:
        try:
            return self.weight.rows(tokens, self.output_dtype)
        except (IndexError, RuntimeError) as error:
            raise InputError(f"tokens must be int64 or int32 in [0, {self.num_embeddings}): {error}") from error

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantizedEmbedding:
        # `.to(dtype)` changes the dtype of the output, as for an nn.Embedding, although no stored float changes.
        self.output_dtype = fn(torch.empty(0, dtype=self.output_dtype)).dtype
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
