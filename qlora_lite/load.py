"""`load_quantized`: from a checkpoint on disk to a frozen packed model, one tensor at a time."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite import hub
from qlora_lite.config import QuantConfig
from qlora_lite.errors import CheckpointError
from qlora_lite.finite import check_finite
from qlora_lite.memory.host import keep_freed_pages
from qlora_lite.quantize_base import pack_linear_, pack_rest_, packable_alone
from qlora_lite.storage import TensorFiles


def _place(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, key = name.rpartition(".")
    module = model.get_submodule(owner)
    if key in module._parameters:
        setattr(module, key, nn.Parameter(tensor, requires_grad=False))
    else:
        setattr(module, key, tensor)


def _check_names(model: nn.Module, files: TensorFiles) -> dict[str, Tensor]:
    """The model's own (meta) tensors by name; one CheckpointError lists what is missing and what is unexpected."""
    wanted = model.state_dict(keep_vars=True)
    found = set(files.file_of)
    ignorable = [re.compile(pattern) for pattern in hub.ignorable_keys(model)]
    unexpected = {n for n in found - wanted.keys() if not any(pattern.search(n) for pattern in ignorable)}
    missing = wanted.keys() - found - hub.tied_names(model)
    problems = [
        f"{len(names)} tensors {what}: {', '.join(sorted(names)[:8])}{' …' if len(names) > 8 else ''}"
        for what, names in (("are missing", missing), ("belong to no module", unexpected))
        if names
    ]
    if problems:
        raise CheckpointError(f"{files.folder} does not fit this {type(model).__name__}: {'; '.join(problems)}")
    return wanted


def load_quantized(
    path_or_id: str | Path,
    config: QuantConfig | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> Any:
    """A transformers causal language model from a safetensors checkpoint, its linear layers packed, all of it frozen.

    What is not packed (norms, embeddings, biases) is held in `dtype`, which is then the dtype of the activations.
    A linear layer is packed when its weight has been read, so that one unpacked weight is held at a time.
    Raises CheckpointError for missing, unexpected or mis-shaped tensors, all listed, QuantizationError for NaN or
    infinity.
    """
    config = config or QuantConfig()
    keep_freed_pages()
    folder = hub.resolve(path_or_id)
    files = TensorFiles(folder)
    model: Any = hub.empty_model(hub.read_config(folder), dtype)
    wanted = _check_names(model, files)
    hub.tie(model)
    alone = packable_alone(model, config)
    wrong = []
    for name, tensor in files.items():
        if name not in wanted:
            continue
        if tensor.shape != wanted[name].shape:
            wrong.append(f"{name} is {tuple(tensor.shape)}, the model has {tuple(wanted[name].shape)}")
            continue
        target = wanted[name].dtype if not tensor.is_floating_point() else dtype
        placed = tensor.to(device=device, dtype=target, copy=True)
        check_finite(placed, name)
        _place(model, name, placed)
        del tensor, placed
        owner, _, key = name.rpartition(".")
        if key == "weight" and owner in alone:
            pack_linear_(model, owner, config)
    if wrong:
        raise CheckpointError(f"{folder} has tensors of the wrong shape: {'; '.join(wrong)}")
    hub.tie(model)
    hub.fill_computed_buffers_(model, torch.device(device))
    hub.read_generation_config_(model, folder)
    model.config._name_or_path = str(folder.absolute())
    pack_rest_(model, config)
    return model.requires_grad_(False)
