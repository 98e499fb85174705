"""A checkpoint made from a config alone: its tensors have names, shapes and dtypes, and no values.

On fake tensors (rehearsal.py), a model is filled from it by the code that fills a model from a real checkpoint.
Packing creates the same temporaries for all weights of one shape and format. It is therefore run only for the last of
them, when the most bytes are resident; for the others just the packed buffers are allocated.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.checkpoints import conversion
from qlora_lite.checkpoints.checkpoint import Checkpoint
from qlora_lite.checkpoints.conversion import converted_tensors
from qlora_lite.checkpoints.lazy_tensors import LazyTensor, ShapeOnlyTensor
from qlora_lite.checkpoints.pack_on_load import LazyPackedWeight
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.formats import row_step
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.quantization.quantize_model import WeightToPack


@dataclass(frozen=True)
class ShapeOnlyPackedWeight:
    """A weight to be packed whose `load` allocates the packed buffers and computes nothing."""

    shape: tuple[int, ...]
    format: str
    config: QuantConfig

    @property
    def step(self) -> int:
        return row_step(self.shape, self.format, self.config.blocksize)

    def load(self, device: torch.device) -> PackedWeight:
        rows, columns = self.shape
        return PackedWeight((rows, columns), self.format, self.config.blocksize, self.config.double_quant, device)


def _shape_only(name: str, tensor: Tensor, dtype: torch.dtype) -> ShapeOnlyTensor:
    return ShapeOnlyTensor(name, dtype if tensor.is_floating_point() else tensor.dtype, tuple(tensor.shape))


class ShapeOnlyCheckpoint:
    """The checkpoint of a model on meta, with tensors of `dtype` on disk. Of tied tensors it has the first.

    Serves `load_tensors_` in the place of a `Checkpoint`.
    """

    def __init__(self, model: nn.Module, config: QuantConfig, dtype: torch.dtype) -> None:
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        tied = architecture.tied_names(model)
        stored = conversion.tensors_as_saved(model)
        files = {name: _shape_only(name, tensor, dtype) for name, tensor in stored.items()}
        # The same views and the same reading order as for a real checkpoint, since both decide about the peak.
        tensors = converted_tensors(model, shapes, files).tensors
        self.config = config
        self.tensors: Mapping[str, LazyTensor] = {name: tensors[name] for name in tensors if name not in tied}
        self._whole = Checkpoint(Path(), config, self.tensors)
        self._packed_slots: set[int] = set()

    def plain(self, name: str) -> LazyTensor:
        return self._whole.plain(name)

    def packed_weights(self, name: str, to_pack: WeightToPack, dtype: torch.dtype) -> list[LazyPackedWeight]:
        """Returns the weights of a real checkpoint if packing is run for this one, else weights that only allocate."""
        found = self._whole.packed_weights(name, to_pack, dtype)
        if id(to_pack) in self._packed_slots:
            return found
        return [ShapeOnlyPackedWeight(weight.shape, to_pack.format, self.config) for weight in found]

    def weights_to_pack(self, model: nn.Module) -> list[WeightToPack]:
        """Returns the weights of the model that are to be packed, and selects those whose packing is run."""
        found = self._whole.weights_to_pack(model)
        position = {name: number for number, name in enumerate(self.tensors)}
        in_order = sorted(found, key=lambda to_pack: position.get(to_pack.name, 0))
        last_of_kind = {(to_pack.weight.shape, to_pack.format): to_pack for to_pack in in_order}
        self._packed_slots = {id(to_pack) for to_pack in last_of_kind.values()}
        return found
