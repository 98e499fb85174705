"""Where the weights of an exported model come from: a model in memory, or a checkpoint and an adapter on disk.

The step of a weight on its way out between weight_rows.py and plan.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.checkpoints.base_identity import LOAD_REPACKED_HINT, PACKED_HASH_KEY, packed_weights_hash
from qlora_lite.checkpoints.checkpoint import Checkpoint
from qlora_lite.checkpoints.files import read_json
from qlora_lite.checkpoints.lazy_tensors import READ_BYTES, LazyTensor, read_slices
from qlora_lite.compute.host_memory import release_freed_pages
from qlora_lite.compute.weight_update import StackDelta, Update
from qlora_lite.errors import CheckpointError
from qlora_lite.export.plain_weights import PlainWeight
from qlora_lite.export.weight_rows import (
    DenseRows,
    RepackedRows,
    StoredRows,
    WeightRows,
    packed_rows,
)
from qlora_lite.lora.adapters import lora_layers
from qlora_lite.lora.kinds import StackKind
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.lora.peft.auxiliary import stored_replacements_
from qlora_lite.lora.peft.experts import stack_key_names, unflatten_A, unflatten_B
from qlora_lite.lora.peft.keys import BASE_COPY, PREFIX, TOKEN_ADAPTER, adapter_tensors, peft_key
from qlora_lite.lora.peft.options import CONFIG_FILE
from qlora_lite.quantization.experts import PackedStack
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.quantization.quantize_model import WeightToPack


class ModelWeights(Protocol):
    """The weights of a trained model, by `PlainWeight`."""

    def trained(self, weight: PlainWeight, by_matrix: bool = False) -> list[WeightRows]:
        """Returns the rows of W0 as it was in training, in the plain checkpoint's orientation.

        One element, or one for each matrix of a stack that is packed or adapted. by_matrix: of any stack.
        """

    def delta(self, weight: PlainWeight) -> Update:
        """Returns the update of a weight that has one."""

    def integers(self, weight: PlainWeight) -> Tensor:
        """Returns a whole tensor of integers."""


class ModelInMemory:
    """The weights of a model in memory."""

    def trained(self, weight: PlainWeight, by_matrix: bool = False) -> list[WeightRows]:
        held = weight.holder
        if isinstance(held, PackedStack):
            return [packed_rows(matrix, held.transposed) for matrix in held]
        if by_matrix or isinstance(weight.delta, StackDelta):
            assert isinstance(held, Tensor)
            return [DenseRows(matrix) for matrix in held]
        return [packed_rows(held, weight.transposed) if isinstance(held, PackedWeight) else DenseRows(held)]

    def delta(self, weight: PlainWeight) -> Update:
        assert weight.delta is not None
        return weight.delta

    def integers(self, weight: PlainWeight) -> Tensor:
        assert isinstance(weight.holder, Tensor)
        return weight.holder


class ModelOnDisk:
    """The weights that `load_quantized` and `load_adapter_` would give a model, read from disk.

    weights_to_pack: the packed layers of the model on meta, before it got adapters. updates: of the adapter on disk, by
    the weights' names (`lazy_updates_`). created: what parameters start from that the checkpoint lacks, by name.
    """

    def __init__(
        self,
        weights_to_pack: list[WeightToPack],
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        updates: Mapping[str, Callable[[], Update]],
        created: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._created = created or {}
        self._checkpoint, self._dtype, self._updates = checkpoint, dtype, updates
        self._to_pack = {id(to_pack.weight): to_pack for to_pack in weights_to_pack}

    def _name(self, weight: PlainWeight) -> str:
        name = weight.name_in(self._checkpoint.tensors)
        assert name is not None  # the checkpoint fits the model
        return name

    def trained(self, weight: PlainWeight, by_matrix: bool = False) -> list[WeightRows]:
        if weight.name in self._created:
            return [DenseRows(self._created[weight.name])]
        name, to_pack = self._name(weight), self._to_pack.get(id(weight.holder))
        if to_pack is None:
            stored = self._checkpoint.plain(name)
            matrices = _matrices(stored, by_matrix or isinstance(weight.delta, StackDelta))
            return [StoredRows(matrix, weight.holder.dtype) for matrix in matrices]
        packed = self._checkpoint.packed_weights(name, to_pack, self._dtype)
        return [RepackedRows(matrix, to_pack.transposed) for matrix in packed]

    def delta(self, weight: PlainWeight) -> Update:
        return self._updates[weight.name]()

    def integers(self, weight: PlainWeight) -> Tensor:
        stored = self._checkpoint.plain(self._name(weight))
        return stored.rows(0, stored.shape[0] if stored.shape else 1)


def lazy_updates_(model: nn.Module, folder: str | Path) -> dict[str, Callable[[], Update]]:
    """Returns the updates of an adapter on disk, by the weights' names; each call of one reads it again.

    model: on meta, with the adapter loaded by `load_adapter_`. Its A and B are moved to meta, so that only the update
    in use takes memory.
    """
    stored = adapter_tensors(Path(folder))

    def update(layer: LoraLayer, keys: dict[str, str]) -> Update:
        values = {part: stored[key].read() for part, key in keys.items()}
        lora_A, lora_B = values["lora_A"], values["lora_B"]
        if isinstance(layer.kind, StackKind):
            experts = layer.lora_A.shape[0]
            lora_A, lora_B = unflatten_A(lora_A, experts), unflatten_B(lora_B, experts)
        else:
            lora_A, lora_B = lora_A.flatten(1), lora_B.flatten(1)
        return layer.variant.updated(layer.kind.delta(lora_A, lora_B, layer.scaling), values)

    def bias_update(layer: LoraLayer, keys: dict[str, str]) -> Update:
        added = layer.variant.bias_update(layer.scaling, {part: stored[key].read() for part, key in keys.items()})
        assert added is not None
        return added

    found: dict[str, Callable[[], Update]] = {**stored_replacements_(model, stored)}
    layers = lora_layers(model)
    stacks = [name for name, layer in layers.items() if isinstance(layer.kind, StackKind)]
    stored_names = stack_key_names(model, stacks)
    for name, layer in layers.items():
        keys = {part: peft_key(stored_names.get(name, name), layer.kind, part) for part in layer.lora_parameters}
        weight = name if isinstance(layer.kind, StackKind) else f"{name}.weight"
        found[weight] = functools.partial(update, layer, keys)
        if layer.variant.added_bias is not None:
            found[f"{name}.bias"] = functools.partial(bias_update, layer, keys)
        layer.to("meta")
    release_freed_pages()
    return found


def check_same_base(
    adapter: Path, model: nn.Module, checkpoint: Checkpoint, weights_to_pack: list[WeightToPack], dtype: torch.dtype
) -> None:
    """Raises CheckpointError if a base weight in the adapter's files differs from the checkpoint's.

    Only for weights that are not packed. `load_adapter_` compares them too, but cannot for a model on meta.
    """
    packed, tied = (
        {name for to_pack in weights_to_pack for name in to_pack.modules},
        dict(architecture.tied_pairs(model)),
    )
    for key, copy in adapter_tensors(adapter).items():
        name = key.removeprefix(PREFIX).removesuffix(BASE_COPY).removesuffix(TOKEN_ADAPTER)
        if not key.endswith(BASE_COPY) or name in packed:
            continue
        stored = checkpoint.plain(tied.get(f"{name}.weight", f"{name}.weight"))
        for first, rows in read_slices(stored, READ_BYTES):
            if not torch.equal(rows.to(dtype), copy.rows(first, first + rows.shape[0]).to(dtype)):
                raise CheckpointError(f"{adapter}: {name} comes with a base weight that differs from the checkpoint's")


def check_repacked_base(
    adapter: Path, names: list[str], checkpoint: Checkpoint, weights_to_pack: list[WeightToPack], dtype: torch.dtype
) -> None:
    """Raises CheckpointError for an adapter on weights that LoftQ packed, unless the checkpoint holds these."""
    digest = read_json(adapter / CONFIG_FILE).get(PACKED_HASH_KEY)
    if digest is None:
        return
    weight_of = {name: to_pack for to_pack in weights_to_pack for name in to_pack.modules}
    is_packed = not checkpoint.originals and weight_of.keys() >= set(names)
    stored = ((name, checkpoint.packed_weights(f"{name}.weight", weight_of[name], dtype)[0]) for name in sorted(names))
    packed = ((name, weight.load(torch.device("cpu"))) for name, weight in stored)
    if not is_packed or packed_weights_hash(packed) != digest:
        raise CheckpointError(
            f"{adapter} belongs to a base that LoftQ packed anew, which {checkpoint.folder} is not; "
            f"{LOAD_REPACKED_HINT}"
        )


def as_stored(stored: LazyTensor, trained: list[WeightRows]) -> list[WeightRows]:
    """Returns the rows of a tensor in a file, divided like `trained`: whole, or into the matrices of a stack."""
    return [StoredRows(matrix) for matrix in _matrices(stored, len(trained[0].shape) < len(stored.shape))]


def _matrices(stored: LazyTensor, stacked: bool) -> list[LazyTensor]:
    """Returns the matrices of a stack, or the whole tensor."""
    return [stored.select(index) for index in range(stored.shape[0])] if stacked else [stored]
