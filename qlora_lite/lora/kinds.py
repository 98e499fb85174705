"""How each kind of layer applies A and B: linear, GPT-2's Conv1D, embedding, stacks of experts' matrices.

(Convolutions: conv_kind.py. Routers of experts: router_kind.py.)

The equation itself stands in lora.py; a kind says what shapes A and B have, how a weight and a low-rank term meet an
input, and how the update lies in the orientation of the stored weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from qlora_lite.compute.lora_linear import Adapted, adapted_linear, check_features, with_gain
from qlora_lite.compute.weight_update import AdapterDelta, Delta, StackDelta
from qlora_lite.errors import InputError, listing
from qlora_lite.lora.convolution import CONVOLUTIONS, ConvKind, refusal_reason
from qlora_lite.surgery import has_own_forward, is_router, is_transposed_linear

MAX_NORM_EPS = 1e-7  # torch.nn.functional.embedding's own


class Kind(Protocol):
    """How one kind of layer applies a weight and a low-rank term to its input; `title` is its name in messages."""

    title: ClassVar[str]

    def features(self, base: Any) -> tuple[int, int]:
        """(in, out) of the weight update B A, whose shape is (out, in)."""

    def apply(
        self, layer: Adapted, x: Tensor, weight: Any, lora: tuple[Tensor, Tensor] | None, gain: Tensor | None = None
    ) -> Tensor:
        """The layer's output for this weight, with or without the low-rank term, times 1 + gain `(out,)` if given."""

    def as_matrix(self, weight: Tensor) -> Tensor:
        """The stored weight as `(out, in)`."""

    def delta(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> AdapterDelta:
        """scaling * B A `(out, in)`, in the orientation of the stored weight."""

    def file_shapes(self, base: Any, rank: int) -> dict[str, tuple[int, ...]]:
        """The shapes of A and B in peft's files, by our names of them."""


def matrix_shapes(width: int, height: int, rank: int) -> dict[str, tuple[int, ...]]:
    """Those of A and B of a matrix `(height, width)`."""
    return {"lora_A": (rank, width), "lora_B": (height, rank)}


class LinearKind:
    title: ClassVar[str] = "a linear layer"

    def features(self, base: Any) -> tuple[int, int]:
        return base.in_features, base.out_features

    def apply(
        self, layer: Adapted, x: Tensor, weight: Any, lora: tuple[Tensor, Tensor] | None, gain: Tensor | None = None
    ) -> Tensor:
        base: Any = layer.base_layer
        check_features(x, layer.in_features)
        lora_A, lora_B = lora or (None, None)
        y = adapted_linear(
            x,
            weight,
            layer.bias if gain is None else None,
            lora_A,
            lora_B,
            scaling=layer.scaling,
            dropout=layer.dropout if layer.training else 0.0,
            compute_dtype=getattr(base, "compute_dtype", None),
        )
        if gain is not None:
            y = with_gain(y, gain)
            y = y if layer.bias is None else y.add_(layer.bias.to(y.dtype))
        return y

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight

    def file_shapes(self, base: Any, rank: int) -> dict[str, tuple[int, ...]]:
        return matrix_shapes(*self.features(base), rank)

    def delta(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Delta:
        return Delta(lora_B.float(), lora_A.float(), scaling)


class TransposedLinearKind(LinearKind):
    """A linear layer that holds its weight as `(in, out)`, unpacked: GPT-2's Conv1D."""

    def features(self, base: Any) -> tuple[int, int]:
        return base.weight.shape[0], base.weight.shape[1]

    def apply(
        self, layer: Adapted, x: Tensor, weight: Any, lora: tuple[Tensor, Tensor] | None, gain: Tensor | None = None
    ) -> Tensor:
        return super().apply(layer, x, weight.T, lora, gain)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def delta(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Delta:
        return super().delta(lora_A, lora_B, scaling).transposed


class _TokenColumns(torch.autograd.Function):
    """A[:, tokens] as `(*tokens.shape, rank)`, with the gradients that torch.nn.Embedding would give its weight."""

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
        # A is stored the other way round: the same values, with the token as second index.
        (token_index,), values = rows._indices(), rows._values()
        rank = values.shape[1]
        first = torch.arange(rank, device=values.device).repeat(token_index.numel())
        index = torch.stack((first, token_index.repeat_interleave(rank)))
        columns = torch.sparse_coo_tensor(index, values.reshape(-1), (rank, ctx.width), check_invariants=False)
        return columns, None, None, None, None


def is_scaled_embedding(module: nn.Module) -> bool:
    """Whether this is an embedding of transformers whose rows are multiplied by a constant (Gemma's, BART's)."""
    named = isinstance(module, nn.Embedding) and type(module).__name__.endswith("ScaledWordEmbedding")
    return named and isinstance(getattr(module, "embed_scale", None), (Tensor, float, int))


def _scale_of(base: Any) -> Tensor:
    return torch.as_tensor(base.embed_scale, device=base.weight.device)


class EmbeddingKind:
    title: ClassVar[str] = "an embedding"

    def features(self, base: Any) -> tuple[int, int]:
        return base.num_embeddings, base.embedding_dim

    def _check_tokens(self, base: Any, tokens: Tensor) -> None:
        kind = tokens.dtype if isinstance(tokens, Tensor) else f"a {type(tokens).__name__}"
        if kind not in (torch.int64, torch.int32):
            raise InputError(f"an embedding takes tokens of dtype int64 or int32; got {kind}")

    def apply(
        self, layer: Adapted, x: Tensor, weight: Any, lora: tuple[Tensor, Tensor] | None, gain: Tensor | None = None
    ) -> Tensor:
        base: Any = layer.base_layer
        self._check_tokens(base, x)
        try:
            y = F.embedding(x, weight) if isinstance(weight, Tensor) else weight.rows(x, base.output_dtype)
        except IndexError as error:
            bad = x[(x < 0) | (x >= base.num_embeddings)]
            raise InputError(
                f"tokens must be in [0, {base.num_embeddings}); got {listing(bad.flatten().tolist(), 1)}"
            ) from error
        if lora is not None:
            lora_A, lora_B = lora
            frequency, sparse = getattr(base, "scale_grad_by_freq", False), getattr(base, "sparse", False)
            low = _TokenColumns.apply(lora_A, x, base.padding_idx, frequency, sparse)
            low = F.dropout(low, layer.dropout, layer.training).to(y.dtype)
            y = y + (low @ lora_B.to(y.dtype).T) * layer.scaling
        y = self._limit_norm(base, y if gain is None else with_gain(y, gain))
        return y * _scale_of(base).to(y.dtype) if is_scaled_embedding(base) else y

    def _limit_norm(self, base: Any, rows: Tensor) -> Tensor:
        """Rows longer than `max_norm` are shortened to it: those that are returned, not those that are stored."""
        if getattr(base, "max_norm", None) is None:
            return rows
        norm = rows.norm(base.norm_type, dim=-1, keepdim=True)
        return torch.where(norm > base.max_norm, rows * (base.max_norm / (norm + MAX_NORM_EPS)), rows)

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.T

    def file_shapes(self, base: Any, rank: int) -> dict[str, tuple[int, ...]]:
        return matrix_shapes(*self.features(base), rank)

    def delta(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Delta:
        left, right = lora_A.float().T.contiguous(), lora_B.float().T.contiguous()
        return Delta(left, right, scaling, by_columns=True)


@dataclass(frozen=True)
class StackKind:
    """A stack of matrices `(experts, out, in)`, or `(experts, in, out)` if transposed, each with its own A and B.

    A `(experts, rank, in)`, B `(experts, out, rank)`. The module that routes tokens to experts holds the stack, and
    computes matrix by matrix with what `LoraLayer.in_use` gives it (experts.py).
    """

    transposed: bool
    title: ClassVar[str] = "a stack of experts"

    def features(self, base: Any) -> tuple[int, int]:
        _, rows, columns = base.weight.shape
        return (rows, columns) if self.transposed else (columns, rows)

    def apply(
        self, layer: Adapted, x: Tensor, weight: Any, lora: tuple[Tensor, Tensor] | None, gain: Tensor | None = None
    ) -> Tensor:
        raise InputError("a stack of experts is not called by itself; call the module that routes tokens to them")

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight.mT if self.transposed else weight

    def delta(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> StackDelta:
        pairs = zip(lora_A.float(), lora_B.float(), strict=True)
        matrices = (Delta(matrix_B, matrix_A, scaling) for matrix_A, matrix_B in pairs)
        return StackDelta(tuple(matrix.transposed if self.transposed else matrix for matrix in matrices))

    def file_shapes(self, base: Any, rank: int) -> dict[str, tuple[int, ...]]:
        """By experts; in the files they lie flat (experts.py)."""
        experts, (width, height) = base.weight.shape[0], self.features(base)
        return {"lora_A": (experts, rank, width), "lora_B": (experts, height, rank)}


def kind_of(base: nn.Module) -> Kind | None:
    """How this layer is adapted, from what it offers; None for a layer that cannot be."""
    # nn.MultiheadAttention reads the weight of its out_proj itself and never calls it: an adapter there does nothing.
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


class RouterKind:
    title: ClassVar[str] = "a router"

    def features(self, base: Any) -> tuple[int, int]:
        return base.weight.shape[1], base.weight.shape[0]

    def apply(
        self, layer: Adapted, x: Tensor, weight: Tensor, lora: tuple[Tensor, Tensor] | None, gain: Tensor | None = None
    ) -> Any:
        """What the router returns, be it a tensor or several. The sum is formed in fp32, and is of the router's dtypes.

        (So is what was merged or trained in others: the router multiplies as it is, with tokens of the model's.)
        """
        base: Any = layer.base_layer
        if lora is not None:
            lora_A, lora_B = lora
            with torch.autocast(x.device.type, enabled=False):
                added = layer.scaling * (lora_B.float() @ lora_A.float())
                weight = weight.float() + added
        held = {"weight": weight.to(base.weight.dtype)}
        if layer.bias is not None:
            held["bias"] = layer.bias.to(base.bias.dtype)
        return functional_call(base, held, (x,))

    def as_matrix(self, weight: Tensor) -> Tensor:
        return weight

    def file_shapes(self, base: Any, rank: int) -> dict[str, tuple[int, ...]]:
        width, experts = self.features(base)
        return {"lora_A": (rank, width), "lora_B": (experts, rank)}

    def delta(self, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Delta:
        return Delta(lora_B.float(), lora_A.float(), scaling)
