"""Rows of an embedding that are trained themselves, for tokens that were added: peft's trainable_token_indices.

    y = R[place of the token]   for the tokens that are trained      R: `(tokens, features)`, trained
    y = W0[token]               for all others                       W0: frozen, packed or not

R begins as those rows of W0. Only R is trained and stored, whatever the vocabulary. An output head that is tied to the
embedding has the same R: its logits of these tokens are R x.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qlora_lite.errors import TargetError
from qlora_lite.layer_kinds import LinearKind, kind_of
from qlora_lite.surgery import has_own_forward

SCALE = "embed_scale"  # what transformers' scaled embeddings (Gemma) multiply their rows with


class TokenRows(nn.Module):
    """The trained rows, `values` `(tokens, features)`, one for each of `indices`. A tie is two owners of one."""

    tokens: Tensor

    def __init__(self, indices: Sequence[int], values: Tensor) -> None:
        super().__init__()
        self.indices = tuple(indices)
        self.register_buffer("tokens", torch.tensor(self.indices, device=values.device))
        self.values = nn.Parameter(values)

    def looked_up(self, x: Tensor, dtype: torch.dtype, padding_idx: int | None) -> tuple[Tensor, Tensor]:
        """(whether a token has a row here, that row or any) of tokens x. No gradient goes to the padding token's."""
        ordered, places = self.tokens.sort()
        nearest = torch.searchsorted(ordered, x.to(ordered.dtype)).clamp_(max=len(self.indices) - 1)
        padding = self.indices.index(padding_idx) if padding_idx in self.indices else None
        return ordered[nearest] == x, F.embedding(places[nearest], self.values.to(dtype), padding)

    def extra_repr(self) -> str:
        return f"tokens={self.indices}"


class WithTokenRows(nn.Module):
    """An embedding, or an output head tied to one, with trained rows for some tokens.

    `adapter_enabled=False` computes what the base does. What is asked of it beyond that, the base answers: `weight` is
    that of the base.
    """

    def __init__(self, base_layer: nn.Module, rows: TokenRows) -> None:
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.rows = rows
        self.adapter_enabled = True
        self.training = base_layer.training

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if "rows" not in modules or name in modules:
            return super().__getattr__(name)
        return getattr(modules["base_layer"], name)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base_layer(x)
        if not self.adapter_enabled:
            return y
        if isinstance(kind_of(self.base_layer), LinearKind):
            bias, values = getattr(self.base_layer, "bias", None), self.rows.values.to(x.dtype)
            logits = F.linear(x, values, None if bias is None else bias[self.rows.tokens].to(x.dtype))
            return y.index_copy(-1, self.rows.tokens, logits.to(y.dtype))
        inside, rows = self.rows.looked_up(x, y.dtype, getattr(self.base_layer, "padding_idx", None))
        scale = getattr(self.base_layer, SCALE, None)
        if scale is not None:
            rows = rows * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)
        return torch.where(inside.unsqueeze(-1), rows, y)


@torch.no_grad()
def rows_of(base: Any, indices: Sequence[int], dtype: torch.dtype) -> Tensor:
    """These rows of an embedding's or a head's weight, packed or not, unpacked and in this dtype."""
    tokens = torch.tensor(indices, device=base.weight.device)
    if isinstance(base.weight, Tensor):
        return base.weight.detach().index_select(0, tokens).to(dtype)
    return base.weight.rows(tokens, dtype)  # type: ignore[no-any-return]


def check_tokens(indices: Sequence[int], vocabulary: int) -> None:
    """TargetError for tokens that a weight of so many rows does not have."""
    if outside := [index for index in indices if index >= vocabulary]:
        raise TargetError(
            f"train_tokens {outside[:8]} are outside the vocabulary, which has {vocabulary} tokens: "
            f"resize the model's embeddings first"
        )


@torch.no_grad()
def check_takes_rows(name: str, base: nn.Module) -> None:
    """TargetError for a layer that does more with a row of its weight than return, multiply or scale it."""
    kind = kind_of(base)
    plain = kind is not None and getattr(base, "max_norm", None) is None
    if isinstance(base, nn.Embedding) and has_own_forward(base):
        plain = hasattr(base, SCALE)
        if plain and type(base.weight.data) is Tensor and not base.weight.is_meta:  # fake ones have no values
            token = torch.tensor([base.num_embeddings - 1], device=base.weight.device)
            scale: Any = getattr(base, SCALE)
            plain = torch.allclose(base(token), base.weight[token] * torch.as_tensor(scale).to(base.weight.dtype))
    if not plain:
        raise TargetError(f"{name}, a {type(base).__name__}, computes more than rows of its weight: train it whole")
