"""LoraLayer: a frozen layer with a trained low-rank term.

A *kind* (kinds.py) says how A and B are applied to the input of a linear layer, an embedding or another layer. A
*variant* (variants.py) says what is trained in addition. `LinearWithLoRA` and `Embedding` make their own base.

Nothing writes to the base. Merging computes a second weight and unmerging drops it. So unmerging restores W0 bit for
bit, packed bases can be merged, and `forward`, `train`, `eval` and `state_dict` change no stored value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite.checks import cast_finite, is_count, require
from qlora_lite.compute.lora_linear import taken_output
from qlora_lite.compute.products.frozen_weight import Weight, dense_slices, dequantized, weight_of
from qlora_lite.compute.weight_update import AdapterDelta
from qlora_lite.errors import ConfigError, TargetError
from qlora_lite.lora.config import check_lora_numbers
from qlora_lite.lora.convolution import FORWARDED_ATTRIBUTES, refusal_reason
from qlora_lite.lora.kinds import RouterKind, StackKind, kind_of
from qlora_lite.lora.variants import (
    REFERENCE,
    VARIANTS,
    check_variant,
    clear_reference_,
    combination_problems,
    factors_from_reference,
)
from qlora_lite.surgery import is_transposed_linear

INIT_STD = 0.02
# The name of an adapter that was added without one, as in peft.
DEFAULT_ADAPTER = "default"


class LoraLayer(nn.Module):
    """A linear layer, embedding, convolution, stack of experts or router with a low-rank term:

        y = W0 x + scaling * B A dropout(x) + b

    W0 `(out, in)`, of any format, and b are frozen here. A `(rank, in)` and B `(out, rank)` are trained. scaling is
    alpha / rank (LoRA: arXiv:2106.09685, section 4.1), or alpha / sqrt(rank) with `use_rslora` (rank-stabilized LoRA:
    arXiv:2312.03732), with which the size of the update does not depend on the rank.

    For an embedding, `in` is the vocabulary, and tokens select columns of A; dropout then acts on these columns. For a
    convolution, `in` is the size of the kernel of one output channel (convolution.py). A stack of experts has an A and
    a B for each matrix, `(experts, rank, in)` and `(experts, out, rank)`. Stacks and routers have no dropout and no
    variant, as in peft.

    rank, alpha, dropout: see above; dropout acts in training only.
    base_layer: the layer that this one stands around. It is frozen, and otherwise not changed.
    merge_weights: whether the method of this name is permitted.
    adapter_dtype: the dtype of A, B and the variant's other parameters.
    variant: the name of a variant (variants.py), which may change y and train more parameters.

    trained_bias is a parameter in place of b, or None (`train_bias`). start_A and start_B are initial values that the
    update is counted from, or None (variants.py).

    Raises ConfigError for rank < 1, alpha that is not finite, dropout outside [0, 1) and combinations that a variant
    does not have; TargetError for a base that cannot be adapted.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    trained_bias: nn.Parameter | None
    start_A: Tensor | None
    start_B: Tensor | None
    merged_weight: Tensor | None

    def __init__(
        self,
        rank: int,
        alpha: float,
        base_layer: nn.Module,
        merge_weights: bool = True,
        dropout: float = 0.1,
        *,
        adapter_dtype: torch.dtype = torch.float32,
        use_rslora: bool = False,
        variant: str = "lora",
    ) -> None:
        super().__init__()
        check_variant(variant)
        self.variant = VARIANTS[variant]
        check_lora_numbers(rank, alpha, dropout)
        require(isinstance(use_rslora, bool), "use_rslora must be True or False", use_rslora)
        if not isinstance(adapter_dtype, torch.dtype) or not adapter_dtype.is_floating_point:
            raise ConfigError(f"adapter_dtype must be a float dtype; got {adapter_dtype!r}")
        kind = kind_of(base_layer)
        if kind is None or isinstance(base_layer, LoraLayer):
            raise TargetError(
                refusal_reason(base_layer)
                or f"a {type(base_layer).__name__} cannot be adapted; LoraLayer takes linear layers, embeddings and "
                f"convolutions without a forward of their own (quantize_base_ takes over bitsandbytes' layers)"
            )
        if problems := combination_problems({type(base_layer).__name__: kind}, dropout, self.variant):
            raise ConfigError("; ".join(problems))
        self.rank, self.alpha, self.dropout, self.use_rslora = rank, alpha, float(dropout), use_rslora
        self.merge_permitted = merge_weights
        self.adapter_enabled = True
        self.adapter_name = DEFAULT_ADAPTER
        self.kind = kind
        self.base_layer = base_layer.requires_grad_(False)
        self.in_features, self.out_features = kind.features(base_layer)
        weight = weight_of(base_layer)
        device, each = weight.device, weight.shape[:1] if isinstance(kind, StackKind) else ()
        self.lora_A = nn.Parameter(torch.empty(*each, rank, self.in_features, dtype=adapter_dtype, device=device))
        self.lora_B = nn.Parameter(torch.empty(*each, self.out_features, rank, dtype=adapter_dtype, device=device))
        for extra in self.variant.parameters:
            vector = torch.empty(self.out_features, dtype=adapter_dtype, device=device)
            self.register_parameter(extra.name, nn.Parameter(vector))
        self.register_parameter("trained_bias", None)
        for name in REFERENCE:
            self.register_buffer(name, None)
        self.register_buffer("merged_weight", None, persistent=False)
        self.register_load_state_dict_post_hook(_refresh_merged_weight)
        LoraLayer.reset_parameters(self)

    @property
    def scaling(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B of the update: lora_A and lora_B, or A and B of rank 2 r if it is counted from initial values."""
        return (self.lora_A, self.lora_B) if self.start_A is None else factors_from_reference(self)

    @property
    def lora_parameters(self) -> dict[str, nn.Parameter]:
        """A, B and the variant's other parameters, by name."""
        names = ("lora_A", "lora_B", *(extra.name for extra in self.variant.parameters))
        return {name: getattr(self, name) for name in names}

    @property
    def merged(self) -> bool:
        """Whether `forward` uses a merged weight."""
        return self.merged_weight is not None

    @property
    def weight(self) -> Weight:
        """W0, or the merged weight. A model that reads it instead of calling the layer does not use A and B."""
        return weight_of(self.base_layer) if self.merged_weight is None else self.merged_weight

    @property
    def stored_transposed(self) -> bool:
        """Whether a plain checkpoint stores this weight as `(in, out)`: GPT-2's Conv1D, packed or not."""
        return is_transposed_linear(self.base_layer) or bool(getattr(self.base_layer, "transposed", False))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            handed_on = name in FORWARDED_ATTRIBUTES or isinstance(self.__dict__.get("kind"), RouterKind)
            if name == "base_layer" or not handed_on:
                raise
        return getattr(self.base_layer, name)  # an attribute that models read from a convolution or a router

    @property
    def bias(self) -> Tensor | None:
        """b: the base's bias, or the trained one, plus the variant's. With adapters disabled, the base's."""
        bias: Tensor | None = getattr(self.base_layer, "bias", None)
        if not self.adapter_enabled:
            return bias
        bias = bias if self.trained_bias is None else self.trained_bias
        if self.variant.added_bias is None:
            return bias
        added = self.variant.added_bias(self.scaling, self.lora_parameters)
        return added if bias is None else bias + added

    def train_bias(self, values: Tensor) -> None:
        """Adds a trained bias with these initial values, which replaces the base's."""
        self.trained_bias = nn.Parameter(values)

    def reset_parameters(self) -> None:
        """Fills A from N(0, 0.02) and B with 0, so that the layer computes what its base does.

        The column of A for an embedding's padding token is 0.
        """
        clear_reference_(self)
        nn.init.normal_(self.lora_A, mean=0, std=INIT_STD)
        nn.init.zeros_(self.lora_B)
        padding_idx = getattr(self.base_layer, "padding_idx", None)
        if padding_idx is not None:
            with torch.no_grad():
                self.lora_A[:, padding_idx].zero_()
        self.variant.reset_parameters_(self)
        _refresh_merged_weight(self, None)

    def base_rows(self) -> Iterator[tuple[int, Tensor]]:
        """Yields (first row, rows in fp32) of W0 as it is stored."""
        weight = weight_of(self.base_layer)
        weight = weight.flatten(1) if isinstance(weight, Tensor) else weight  # a kernel as a matrix
        for part, rows in dense_slices(weight, torch.empty(0, device=self.lora_A.device)):
            yield part.start, rows.detach()

    def current_weights(self) -> tuple[Weight, tuple[Tensor, Tensor] | None]:
        """Returns the weight that a call uses now, and A and B, or None if it is merged or adapters are disabled."""
        if self.merged_weight is not None and self.adapter_enabled:
            return self.merged_weight, None
        return weight_of(self.base_layer), self.factors if self.adapter_enabled else None

    def forward(self, x: Tensor) -> Tensor:
        ready = taken_output(x, self)
        if ready is not None:
            return ready
        weight, lora = self.current_weights()
        gain = None if lora is None or self.variant.gain is None else self.variant.gain(self)
        return self.kind.apply(self, x, weight, lora, gain)

    @property
    def delta(self) -> AdapterDelta:
        """The update of the base weight, in the orientation of the stored weight."""
        lora_A, lora_B = self.factors
        low_rank = self.kind.delta(lora_A.detach(), lora_B.detach(), self.scaling)
        return self.variant.updated(low_rank, self.lora_parameters)

    @torch.no_grad()
    def delta_weight(self) -> Tensor:
        """Returns W - W0, with W the merged weight, in fp32 and the orientation of the stored weight."""
        delta = self.delta
        if not delta.additive:
            return self.effective_weight(torch.float32) - dequantized(weight_of(self.base_layer), torch.float32)
        return delta.add_to_(torch.zeros(weight_of(self.base_layer).shape, device=self.lora_A.device), 0)

    @torch.no_grad()
    def effective_weight(self, dtype: torch.dtype, name: str = "the merged weight") -> Tensor:
        """Returns the merged weight: W0 with its update, unpacked and summed in fp32, then cast.

        Raises QuantizationError with this name if a value overflows the dtype.
        """
        base = weight_of(self.base_layer)
        weight = (
            base.detach().to(torch.float32, copy=True) if isinstance(base, Tensor) else dequantized(base, torch.float32)
        )
        weight = weight.contiguous()  # so that the view of a kernel as a matrix exists
        return cast_finite(self.delta.prepared(self.base_rows).add_to_(weight, 0), dtype, name)

    def merge_weights(self, dtype: torch.dtype | None = None, name: str = "the merged weight") -> None:
        """Makes `forward` use a merged weight (`effective_weight`). Does nothing if it does already.

        dtype: that of the merged weight; None: the base's dtype, or the compute dtype of a packed base, or fp32 if that
        has none. Raises ConfigError if the layer was made with merge_weights=False.
        """
        if not self.merge_permitted:
            raise ConfigError("this layer was made with merge_weights=False and must not be merged")
        if self.merged_weight is None:
            self.merged_weight = self.effective_weight(dtype or self._merge_dtype(), name)

    def unmerge_weights(self) -> None:
        """Drops the merged weight. W0 was never changed. Does nothing if the layer is not merged."""
        if not self.merge_permitted:
            raise ConfigError("this layer was made with merge_weights=False and is never merged")
        self.merged_weight = None

    def _merge_dtype(self) -> torch.dtype:
        base, weight = self.base_layer, weight_of(self.base_layer)
        if isinstance(weight, Tensor):
            return weight.dtype
        return getattr(base, "compute_dtype", None) or getattr(base, "output_dtype", None) or torch.float32

    def extra_repr(self) -> str:
        shown = ("rank", "alpha", "use_rslora", "variant", "dropout", "merged")
        facts = {name: getattr(self, name) for name in shown} | {"variant": self.variant.name}
        return ", ".join(f"{name}={value}" for name, value in facts.items())


def _refresh_merged_weight(layer: nn.Module, incompatible_keys: object) -> None:
    """Computes the merged weight again, if there is one. A hook of `load_state_dict`."""
    if isinstance(layer, LoraLayer) and layer.merged_weight is not None:
        layer.merged_weight = layer.effective_weight(layer.merged_weight.dtype)


class LinearWithLoRA(LoraLayer):
    """A LoraLayer around a new `nn.Linear(fan_in, fan_out, bias)`, without dropout."""

    def __init__(
        self, fan_in: int, fan_out: int, rank: int, alpha: float = 1, bias: bool = True, merge_weights: bool = True
    ) -> None:
        super().__init__(rank, alpha, nn.Linear(fan_in, fan_out, bias=bias), merge_weights, dropout=0.0)


class Embedding(LoraLayer):
    """A LoraLayer around a new `nn.Embedding(vocab_size, embed_dim)`, without dropout.

    padding_idx: this row is zero, and stays zero. max_norm, norm_type: limit the returned rows; the stored weight is
    not renormalized. scale_grad_by_freq, sparse: as in nn.Embedding, for the gradient of A.
    """

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        rank: int,
        alpha: float = 1,
        merge_weights: bool = True,
        padding_idx: int | None = None,
        max_norm: float | None = None,
        norm_type: float = 2,
        scale_grad_by_freq: bool = False,
        sparse: bool = False,
    ) -> None:
        require(is_count(vocab_size, 1), "vocab_size must be an integer of at least 1", vocab_size)
        require(is_count(embed_dim, 1), "embed_dim must be an integer of at least 1", embed_dim)
        inside = padding_idx is None or (is_count(abs(padding_idx), 0) and -vocab_size <= padding_idx < vocab_size)
        require(inside, f"padding_idx must be None or a token of the {vocab_size}", padding_idx)
        base = nn.Embedding(vocab_size, embed_dim, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        super().__init__(rank, alpha, base, merge_weights, dropout=0.0)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills the weight from N(0, 1 / sqrt(vocab_size)), its padding row with 0, and A and B as in LoraLayer."""
        base = self.base_layer
        assert isinstance(base, nn.Embedding)
        nn.init.normal_(base.weight, mean=0, std=1 / math.sqrt(base.num_embeddings))
        if base.padding_idx is not None:
            with torch.no_grad():
                base.weight[base.padding_idx].zero_()
        super().reset_parameters()
