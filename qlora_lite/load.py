"""`load_quantized`: from a checkpoint on disk to a frozen packed model, a few rows at a time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite import hub
from qlora_lite.config import QuantConfig
from qlora_lite.conversion import model_tensors
from qlora_lite.errors import CheckpointError, QuantizationError
from qlora_lite.finite import check_finite
from qlora_lite.memory.host import keep_freed_pages, release_freed_pages
from qlora_lite.quantize_base import Slot, slots
from qlora_lite.tensor_files import TensorFiles
from qlora_lite.tensor_views import Source, Transposed, slices
from qlora_lite.weight_rows import READ_BYTES, ToBePacked

SHOWN = 8


def _listed(what: str, names: set[str] | list[str]) -> str:
    return f"{len(names)} tensors {what}: {', '.join(sorted(names)[:SHOWN])}{' …' if len(names) > SHOWN else ''}"


def fitting(model: nn.Module, files: TensorFiles) -> dict[str, Source]:
    """The checkpoint's tensors by the (empty) model's names, converted as transformers would.

    One CheckpointError lists what is missing, unexpected, mis-shaped, or made in a way that is not known here.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    found = model_tensors(model, shapes, files.stored)
    ignorable = [re.compile(pattern) for pattern in hub.ignorable_keys(model)]
    unexpected = [
        name
        for name, target in found.unexpected.items()
        if not any(pattern.search(name) or pattern.search(target) for pattern in ignorable)
    ]
    missing = shapes.keys() - found.tensors.keys() - hub.tied_names(model) - found.failed
    wrong = [
        f"{name} is {source.shape}, the model has {shapes[name]}"
        for name, source in found.tensors.items()
        if name in shapes and source.shape != shapes[name]
    ]
    kinds = (("are missing", missing), ("belong to no module", unexpected), ("have the wrong shape", wrong))
    problems = [_listed(what, names) for what, names in kinds if names]
    problems += found.problems[:SHOWN] + ([f"and {len(found.problems) - SHOWN} more"] if found.problems[SHOWN:] else [])
    if problems:
        raise CheckpointError(f"{files.folder} does not fit this {type(model).__name__}: {'; '.join(problems)}")
    return {name: source for name, source in found.tensors.items() if name in shapes}


def to_be_packed(stored: Source, slot: Slot, config: QuantConfig, dtype: torch.dtype) -> list[ToBePacked]:
    """How a tensor is packed into its slot: each matrix of a stack by itself, turned round if the layer has it so."""
    matrices = [stored] if slot.stack is None else [stored.part(index) for index in range(stored.shape[0])]
    turned = [Transposed(matrix) if slot.transposed else matrix for matrix in matrices]
    return [ToBePacked(matrix, config, slot.format, dtype) for matrix in turned]


class _Placement:
    """Where the tensors of a checkpoint go: into packed weights, or as they are to every module that has them."""

    def __init__(self, model: nn.Module, config: QuantConfig, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.config, self.dtype, self.device = model, config, dtype, device
        self._slots: dict[Tensor, Slot] = {slot.weight: slot for slot in slots(model, config)}
        self._names: dict[Tensor, list[str]] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            self._names.setdefault(tensor, []).append(name)

    def place(self, stored: Source, target: Tensor) -> None:
        """Reads a tensor for the one on meta that it replaces. QuantizationError for values that are not finite."""
        slot = self._slots.get(target)
        if slot is not None:
            packed = [source.pack(self.device) for source in to_be_packed(stored, slot, self.config, self.dtype)]
            if slot.stack is None:
                slot.fill_(self.model, packed[0], self.config)
            else:
                slot.fill_stack_(self.model, packed, self.config)
            return
        dtype = self.dtype if stored.dtype.is_floating_point else target.dtype
        placed = torch.empty(stored.shape, dtype=dtype, device=self.device)
        for first, rows in slices(stored, READ_BYTES):
            if not placed.dim():
                placed.copy_(rows)
                continue
            part = placed[first : first + rows.shape[0]]
            part.copy_(rows)
            check_finite(part, stored.name, first)
        value = nn.Parameter(placed, requires_grad=False) if isinstance(target, nn.Parameter) else placed
        for name in self._names[target]:
            owner, _, key = name.rpartition(".")
            setattr(self.model.get_submodule(owner), key, value)


def load_quantized(
    path_or_id: str | Path,
    config: QuantConfig | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> Any:
    """A transformers causal language model from a safetensors checkpoint, its linear layers packed, all of it frozen.

    Linear layers are GPT-2's Conv1D too, and the matrices of stacks of experts. Tensors that the files hold under other
    names or in pieces are put together while they are read, as transformers' checkpoint conversion says.
    What is not packed (norms, embeddings, biases) is held in `dtype`, which is then the dtype of the activations.
    Of what is packed, a slice of `READ_BYTES` is unpacked at a time, so memory is that of the packed model and little
    more. Raises CheckpointError for missing, unexpected or mis-shaped tensors, all listed, before anything is read;
    QuantizationError for values that are NaN, infinite, or too large for the format, with every tensor that has some.
    """
    config = config or QuantConfig()
    keep_freed_pages()
    folder = hub.resolve(path_or_id)
    files = TensorFiles(folder)
    model: Any = hub.empty_model(hub.read_config(folder), dtype)
    hub.tie(model)
    sources = fitting(model, files)
    targets = model.state_dict(keep_vars=True)
    placement = _Placement(model, config, dtype, torch.device(device))
    bad: list[str] = []
    for name, source in sources.items():
        target = targets.pop(name)  # whose place is taken, and which nothing else needs then
        try:
            placement.place(source, target)
        except QuantizationError as error:
            bad.append(str(error))
    if bad:
        raise QuantizationError("; ".join(bad[:SHOWN]) + (f"; and {len(bad) - SHOWN} more" if bad[SHOWN:] else ""))
    hub.fill_computed_buffers_(model, torch.device(device))
    hub.read_generation_config_(model, folder)
    model.config._name_or_path = str(folder.absolute())
    release_freed_pages()
    return model.requires_grad_(False)
