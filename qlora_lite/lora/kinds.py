"""Kinds of layers: how W0, A and B meet an input in linear layers, embeddings, stacks of experts and routers.

Convolutions have their kind in convolution.py. A kind knows the shapes of A and B, computes a layer's output from them,
and gives the update scaling * B A in the orientation of the stored weight. For rows x:

    LinearKind              y = x W0^T + scaling * (dropout(x) A^T) B^T + b         W0 `(out, in)`
    TransposedLinearKind    the same, with W0 stored as `(in, out)`
    EmbeddingKind           y = W0[x] + scaling * dropout(A^T[x]) B^T               W0 `(vocabulary, out)`, tokens x
    StackKind               LinearKind for each matrix, by the module that routes tokens
    RouterKind              the router itself, with the weight W0 + scaling * B A
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from qlora_lite.compute.lora_linear import AdaptedLayer, adapted_linear, check_features, with_gain
from qlora_lite.compute.products.frozen_weight import PackedMatrix, Weight, weight_of
from qlora_lite.compute.weight_update import AdapterDelta, Delta, StackDelta
from qlora_lite.errors import InputError, listing
from qlora_lite.lora.convolution import CONVOLUTIONS, ConvKind, refusal_reason
from qlora_lite.surgery import has_own_forward, is_router, is_transposed_linear

MAX_NORM_EPS = 1e-7  # torch.nn.functional.embedding's own

Factors = tuple[Tensor, Tensor]


class Kind(Protocol):
    """How one kind of layer computes with W0, A and B. `title` is its name in messages."""

    title: ClassVar[str]

    def features(self, base: nn.Module) -> tuple[int, int]:
        """Returns (in, out) of the update B A `(out, in)`."""

    def apply(
        self, layer: AdaptedLayer, x: Tensor, weight: Weight, lora: Factors | None, gain: Tensor | None = None
    ) -> Tensor:
        """Returns the layer's output for this weight and, unless None, A and B.

        gain `(out,)`: the sum of both products is multiplied by 1 + gain before the bias is added.
        """

    def as_matrix(self, weight: Tensor) -> Tensor:
        """Returns the stored weight as `(out, in)`."""

    def delta(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> AdapterDelta:
        """Returns scaling * B A in the orientation of the stored weight."""

    def file_shapes(self, base: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes of `lora_A` and `lora_B` in peft's files."""


def matrix_shapes(width: int, height: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of `lora_A` and `lora_B` for an update `(height, width)`."""
    return {"lora_A": (rank, width), "lora_B": (height, rank)}


class LinearKind:
    title: ClassVar[str] = "a linear layer"

    def features(self, base: nn.Module) -> tuple[int, int]:
        rows, columns = weight_of(base).shape
        return columns, rows

    def apply(
        self, layer: AdaptedLayer, x: Tensor, weight: Weight, lora: Factors | None, gain: Tensor | None = None
    ) -> Tensor:
        check_features(x, layer.in_features)
        lora_A, lora_B = lora or (None, None)
        bias = layer.bias
        y = adapted_linear(
            x,
            weight,
            bias if gain is None else None,
            lora_A,
            lora_B,
            scaling=layer.scaling,
            dropout=layer.dropout if layer.training else 0.0,
            compute_dtype=getattr(layer.base_layer, "compute_dtype", None),
        )
        if gain is not None:
            y = with_gain(y, gain)
            y = y if bias is None else y.add_(bias.to(y.dtype))
        return y

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight

    def file_shapes(self, base: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        return matrix_shapes(*self.features(base), rank)

    def delta(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Delta:
        return Delta(lora_B.float(), lora_A.float(), scaling)


class TransposedLinearKind(LinearKind):
    """A linear layer that stores its weight unpacked as `(in, out)`: GPT-2's Conv1D."""

    def features(self, base: nn.Module) -> tuple[int, int]:
        rows, columns = weight_of(base).shape
        return rows, columns

    def apply(
        self, layer: AdaptedLayer, x: Tensor, weight: Weight, lora: Factors | None, gain: Tensor | None = None
    ) -> Tensor:
        assert isinstance(weight, Tensor)
        return super().apply(layer, x, weight.T, lora, gain)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def delta(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Delta:
        return super().delta(lora_A, lora_B, scaling).transposed


class _TokenColumns(torch.autograd.Function):
    """A[:, tokens] as `(*tokens.shape, rank)`, with the gradient that torch.nn.Embedding gives its weight.

    A `(rank, vocabulary)`. The gradient of A is dense, or sparse with `sparse`; tokens equal to padding_idx add nothing
    to it, and with scale_by_freq each token's is divided by how often the token occurs.
    """

    @staticmethod
    def forward(
        ctx: Any, lora_A: Tensor, tokens: Tensor, padding_idx: int | None, scale_by_freq: bool, sparse: bool
    ) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.width, ctx.options = lora_A.shape[1], (-1 if padding_idx is None else padding_idx, scale_by_freq, sparse)
        return F.embedding(tokens, lora_A.T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (tokens,) = ctx.saved_tensors
        padding_idx, scale_by_freq, sparse = ctx.options
        # aten's backward of an embedding lookup, for a weight of shape (width, rank).
        rows = torch.ops.aten.embedding_backward(grad, tokens, ctx.width, padding_idx, scale_by_freq, sparse)
        if not sparse:
            return rows.T, None, None, None, None
        # A is the transpose of that weight, so the token is the second index of each value.
        (token_index,), values = rows._indices(), rows._values()
        rank = values.shape[1]
        first = torch.arange(rank, device=values.device).repeat(token_index.numel())
        index = torch.stack((first, token_index.repeat_interleave(rank)))
        columns = torch.sparse_coo_tensor(index, values.reshape(-1), (rank, ctx.width), check_invariants=False)
        return columns, None, None, None, None


def is_scaled_embedding(module: nn.Module) -> bool:
    """Returns whether this is an embedding of transformers that multiplies its rows by a constant (Gemma's, BART's)."""
    named = isinstance(module, nn.Embedding) and type(module).__name__.endswith("ScaledWordEmbedding")
    return named and isinstance(getattr(module, "embed_scale", None), (Tensor, float, int))


class PackedTable(PackedMatrix, Protocol):
    """A packed weight of an embedding."""

    def rows(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the rows of these tokens `(*tokens.shape, width)`."""


class EmbeddingBase(Protocol):
    """Attributes of embeddings. `output_dtype` is that of packed ones, `norm_type` and `embed_scale` of others."""

    num_embeddings: int
    padding_idx: int | None
    output_dtype: torch.dtype
    norm_type: float
    embed_scale: Tensor | float


class EmbeddingKind:
    title: ClassVar[str] = "an embedding"

    def features(self, base: nn.Module) -> tuple[int, int]:
        tokens, width = weight_of(base).shape
        return tokens, width

    def apply(
        self, layer: AdaptedLayer, x: Tensor, weight: Weight, lora: Factors | None, gain: Tensor | None = None
    ) -> Tensor:
        base = cast("EmbeddingBase", layer.base_layer)
        y = self._rows(base, x, weight)
        if lora is not None:
            lora_A, lora_B = lora
            frequency, sparse = getattr(base, "scale_grad_by_freq", False), getattr(base, "sparse", False)
            low: Tensor = _TokenColumns.apply(lora_A, x, base.padding_idx, frequency, sparse)
            low = F.dropout(low, layer.dropout, layer.training).to(y.dtype)
            y = y + (low @ lora_B.to(y.dtype).T) * layer.scaling
        y = self._limit_norm(base, y if gain is None else with_gain(y, gain))
        if not is_scaled_embedding(layer.base_layer):
            return y
        return y * torch.as_tensor(base.embed_scale, device=weight.device).to(y.dtype)

    def _rows(self, base: EmbeddingBase, tokens: Tensor, weight: Weight) -> Tensor:
        """Returns W0[tokens]. Raises InputError for tokens of another dtype or outside of the vocabulary."""
        got = tokens.dtype if isinstance(tokens, Tensor) else f"a {type(tokens).__name__}"
        if got not in (torch.int64, torch.int32):
            raise InputError(f"an embedding takes tokens of dtype int64 or int32; got {got}")
        try:
            if isinstance(weight, Tensor):
                return F.embedding(tokens, weight)
            return cast("PackedTable", weight).rows(tokens, base.output_dtype)
        except IndexError as error:
            count = base.num_embeddings
            bad = tokens[(tokens < 0) | (tokens >= count)]
            raise InputError(f"tokens must be in [0, {count}); got {listing(bad.flatten().tolist(), 1)}") from error

    def _limit_norm(self, base: EmbeddingBase, rows: Tensor) -> Tensor:
        """Returns the rows with those longer than `max_norm` shortened to it. The stored rows keep their length."""
        max_norm = getattr(base, "max_norm", None)
        if max_norm is None:
            return rows
        norm = rows.norm(base.norm_type, dim=-1, keepdim=True)
        return torch.where(norm > max_norm, rows * (max_norm / (norm + MAX_NORM_EPS)), rows)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def file_shapes(self, base: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        return matrix_shapes(*self.features(base), rank)

    def delta(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Delta:
        left, right = lora_A.float().T.contiguous(), lora_B.float().T.contiguous()
        return Delta(left, right, scaling, by_columns=True)


@dataclass(frozen=True)
class StackKind:
    """A stack of experts' matrices `(experts, out, in)`, or `(experts, in, out)` if transposed.

    Each matrix has its own A and B: A `(experts, rank, in)`, B `(experts, out, rank)`. The module that routes tokens to
    experts holds the stack, and multiplies matrix by matrix with `LoraLayer.current_weights` (quantization/experts.py).
    """

    transposed: bool
    title: ClassVar[str] = "a stack of experts"

    def features(self, base: nn.Module) -> tuple[int, int]:
        _, rows, columns = weight_of(base).shape
        return (rows, columns) if self.transposed else (columns, rows)

    def apply(
        self, layer: AdaptedLayer, x: Tensor, weight: Weight, lora: Factors | None, gain: Tensor | None = None
    ) -> Tensor:
        raise InputError("a stack of experts is not called by itself; call the module that routes tokens to them")

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.mT if self.transposed else weight

    def delta(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> StackDelta:
        pairs = zip(lora_A.float(), lora_B.float(), strict=True)
        matrices = (Delta(matrix_B, matrix_A, scaling) for matrix_A, matrix_B in pairs)
        return StackDelta(tuple(matrix.transposed if self.transposed else matrix for matrix in matrices))

    def file_shapes(self, base: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        """Returns the shapes by experts. The files have A and B of all experts in one matrix each (peft/experts.py)."""
        experts, (width, height) = weight_of(base).shape[0], self.features(base)
        return {"lora_A": (experts, rank, width), "lora_B": (experts, height, rank)}


class RouterKind:
    title: ClassVar[str] = "a router"

    def features(self, base: nn.Module) -> tuple[int, int]:
        experts, width = weight_of(base).shape
        return width, experts

    def apply(
        self, layer: AdaptedLayer, x: Tensor, weight: Weight, lora: Factors | None, gain: Tensor | None = None
    ) -> Any:
        """Returns the output of the router, a tensor or several, with the weight W0 + scaling * B A.

        The sum is formed in fp32 and cast to the router's dtype, whatever dtype A, B or a merged weight has.
        """
        base = layer.base_layer
        assert isinstance(weight, Tensor)
        if lora is not None:
            lora_A, lora_B = lora
            with torch.autocast(x.device.type, enabled=False):
                weight = weight.float() + layer.scaling * (lora_B.float() @ lora_A.float())
        held = {"weight": weight.to(base.weight.dtype)}  # type: ignore[arg-type]
        if layer.bias is not None:
            held["bias"] = layer.bias.to(base.bias.dtype)  # type: ignore[arg-type]
        return functional_call(base, held, (x,))

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight

    def file_shapes(self, base: nn.Module, rank: int) -> dict[str, tuple[int, ...]]:
        return matrix_shapes(*self.features(base), rank)

    def delta(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Delta:
        return Delta(lora_B.float(), lora_A.float(), scaling)


def kind_of(base: nn.Module) -> Kind | None:
    """Returns the kind of this layer, or None if it cannot be adapted. `refusal_reason` explains convolutions."""
    # nn.MultiheadAttention reads the weight of its out_proj and never calls the module: an adapter would do nothing.
    if type(base).__name__ == "NonDynamicallyQuantizableLinear":
        return None
    if has_own_forward(base) and not is_scaled_embedding(base):
        return None
    if isinstance(base, tuple(CONVOLUTIONS)):
        return ConvKind() if refusal_reason(base) is None else None
    weight = getattr(base, "weight", None)
    if len(getattr(weight, "shape", ())) == 3 and hasattr(base, "experts"):
        return StackKind(bool(base.transposed))
    if len(getattr(weight, "shape", ())) != 2:
        return None
    if is_router(base):
        return RouterKind()
    packed = not isinstance(weight, Tensor)
    if isinstance(base, nn.Linear) or (packed and hasattr(base, "in_features")):
        return LinearKind()
    if is_transposed_linear(base):
        return TransposedLinearKind()
    if isinstance(base, nn.Embedding) or (packed and hasattr(base, "num_embeddings")):
        return EmbeddingKind()
    return None
