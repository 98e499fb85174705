"""The tensors of a GGUF file as a model of transformers has them: what tensors.py did is undone, some rows at a time.

This is how an export is verified by what it computes: the model that runs has the values of the file, unpacked.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.checkpoints import hub
from qlora_lite.checkpoints.conversion import converted_tensors
from qlora_lite.checkpoints.lazy_tensors import LazyTensor, Selected
from qlora_lite.checkpoints.safetensors_write import PlannedTensor
from qlora_lite.export.gguf.families import Family
from qlora_lite.export.gguf.library import StoredGguf, open_gguf, tensor_names
from qlora_lite.export.gguf.tensors import (
    EXPERT,
    is_norm_plus_one,
    is_transposed,
    permuted_rows,
    stack_name,
    turned_heads,
)


@dataclass(frozen=True)
class ReadBack:
    """A tensor of the plain checkpoint, read from a GGUF file.

    stored: the tensor of the file, or the stack that it is a matrix of. order: the row of `stored` that each row is.
    transposed: the file has the columns as rows. added: what its values have in addition.
    """

    name: str
    shape: tuple[int, ...]
    stored: StoredGguf
    order: Tensor | None = None
    transposed: bool = False
    added: float = 0.0
    dtype: torch.dtype = torch.float32

    def rows(self, start: int, stop: int) -> Tensor:
        if self.order is not None:
            places = self.order[start:stop]
            first = int(places.min())  # the rows of a head stay among themselves
            values = self.stored.rows(first, int(places.max()) + 1)[places - first]
        elif self.stored.shape == self.shape and not self.transposed:
            values = self.stored.rows(start, stop)
        else:  # transposed, or a matrix of one row that the file has as a vector
            whole = self.stored.rows(0, self.stored.shape[0])
            values = (whole.t() if self.transposed else whole.reshape(self.shape))[start:stop]
        return values - self.added if self.added else values

    def select(self, index: int) -> LazyTensor:
        """Returns the tensor at an index of the first dimension."""
        return Selected(self, index)


def read_back(path: Path, tensors: Mapping[str, PlannedTensor], family: Family, config: Any) -> dict[str, LazyTensor]:
    """Returns the tensors of the plain checkpoint, with the values of the file. tensors: those that were written."""
    stored, named = open_gguf(path), tensor_names(family.architecture, config.num_hidden_layers)
    found: dict[str, LazyTensor] = {}
    for name, planned in tensors.items():
        target, expert = named(stack_name(name)), EXPERT.fullmatch(name)
        assert target is not None  # it was written under this name
        held = stored[target] if expert is None else stored[target].matrix(int(expert["index"]))
        heads, order = turned_heads(name, family, config), None
        if heads is not None:
            order = permuted_rows(torch.arange(planned.shape[0]), heads).argsort()
        added = 1.0 if is_norm_plus_one(name, family) else 0.0
        found[name] = ReadBack(name, planned.shape, held, order, is_transposed(name, family), added)
    return found


def empty_model(model: Any, untied: bool) -> nn.Module:
    """Returns the model on meta that an export is read into. untied: head and embedding were written apart."""
    config = type(model.config).from_dict(model.config.to_dict())
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if untied:
        config.tie_word_embeddings = False
    config.architectures = [type(model).__name__]
    empty = hub.empty_model(config, torch.float32)
    architecture.tie(empty)
    return empty


def by_model_names(empty: nn.Module, tensors: Mapping[str, LazyTensor]) -> Mapping[str, LazyTensor]:
    """Returns what transformers makes of a checkpoint's tensors, by the model's names."""
    shapes = {name: tuple(tensor.shape) for name, tensor in empty.state_dict().items()}
    return converted_tensors(empty, shapes, tensors).tensors
