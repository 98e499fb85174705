"""`load_quantized`: from a checkpoint on disk to a frozen packed model, a few rows at a time.

The checkpoint may be a plain one, whose weights are packed on their way in, or one that bitsandbytes packed (saved by
transformers, or by `save_quantized`): then its bytes are taken as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.checkpoints import hub
from qlora_lite.checkpoints.base_identity import checkpoint_identity_or_error, set_base_identity_
from qlora_lite.checkpoints.bitsandbytes_layout import (
    ROWS_FILE,
    StoredInt8Rows,
    StoredPackedWeight,
    stored_int8_rows,
    stored_packed_weights,
)
from qlora_lite.checkpoints.conversion import converted_tensors
from qlora_lite.checkpoints.lazy_tensors import READ_BYTES, LazyTensor, Transposed, read_slices
from qlora_lite.checkpoints.pack_on_load import LazyPackedWeight, PackedOnLoad
from qlora_lite.checkpoints.safetensors_read import TensorFiles, stored_tensors
from qlora_lite.checks import check_finite
from qlora_lite.compute.host_memory import release_freed_pages, set_host_limits
from qlora_lite.compute.slicing import slices_within
from qlora_lite.errors import CheckpointError, ConfigError, QuantizationError, listing
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.quantize_model import Slot, slots
from qlora_lite.signals import poll
from qlora_lite.surgery import answers_to, is_transposed_linear

SHOWN = 8
BITSANDBYTES = "bitsandbytes"


def _listed(what: str, names: set[str] | list[str]) -> str:
    return f"{len(names)} tensors {what}: {listing(sorted(names), SHOWN)}"


Stored = StoredPackedWeight | StoredInt8Rows
_PACKED = (StoredPackedWeight, StoredInt8Rows)


def tensors_for_model(
    model: nn.Module, folder: Path, files: Mapping[str, LazyTensor], packed: Mapping[str, Stored] | None = None
) -> dict[str, LazyTensor | Stored]:
    """The checkpoint's tensors by the (empty) model's names, converted as transformers would, and those packed already.

    One CheckpointError lists what is missing, unexpected, mis-shaped, or made in a way that is not known here.
    """
    wanted: dict[str, Tensor] = model.state_dict(keep_vars=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    found = converted_tensors(model, shapes, files)
    tensors: dict[str, LazyTensor | Stored] = {**found.tensors, **(packed or {})}
    ignorable = [re.compile(pattern) for pattern in architecture.ignorable_keys(model)]
    unexpected = [
        name
        for name, target in found.unexpected.items()
        if not any(pattern.search(name) or pattern.search(target) for pattern in ignorable)
    ]
    unexpected += [name for name in packed or {} if name not in shapes]
    missing = shapes.keys() - tensors.keys() - architecture.tied_names(model) - found.failed
    wrong = [
        f"{name} is {source.shape}, the model has {shapes[name]}"
        for name, source in tensors.items()
        if name in shapes and _plain_shape(model, name, source) != shapes[name]
    ]
    # Codes whose statistics are gone have the shape of a weight, and would pass for one.
    codes = [
        f"{name} is {source.dtype}"
        for name, source in found.tensors.items()
        if name in wanted and wanted[name].is_floating_point() and not source.dtype.is_floating_point
    ]
    kinds = (
        ("are missing", missing),
        ("belong to no module", unexpected),
        ("have the wrong shape", wrong),
        ("hold integers where the model has floats", codes),
    )
    problems = [_listed(what, names) for what, names in kinds if names]
    problems += _torn_apart(model, tensors)
    problems += [listing(found.problems, SHOWN, "; ")] if found.problems else []
    if problems:
        raise CheckpointError(f"{folder} does not fit this {type(model).__name__}: {'; '.join(problems)}")
    twins = {alias for alias, source in architecture.tied_pairs(model) if source in tensors}
    return {name: source for name, source in tensors.items() if name in shapes and name not in twins}


def _torn_apart(model: nn.Module, tensors: Mapping[str, LazyTensor | Stored]) -> list[str]:
    """Weights that are one by the config and two in the checkpoint: which of them the model has, nothing says."""
    return [
        f"{alias} and {source} are tied by the config and differ (with tie_word_embeddings false in it, they are two)"
        for alias, source in architecture.tied_pairs(model)
        if alias in tensors and source in tensors and not _same(tensors[alias], tensors[source])
    ]


def _same(one: LazyTensor | Stored, other: LazyTensor | Stored) -> bool:
    if isinstance(one, _PACKED) or isinstance(other, _PACKED) or one.shape != other.shape:
        return False
    parts = slices_within(one.shape, one.dtype.itemsize, READ_BYTES)
    return all(bool((one.rows(part.start, part.stop) == other.rows(part.start, part.stop)).all()) for part in parts)


def _plain_shape(model: nn.Module, name: str, source: LazyTensor | Stored) -> tuple[int, ...]:
    """The shape of a tensor in a plain checkpoint; what is packed is `(out, in)`, whatever the layer has."""
    turned = isinstance(source, _PACKED) and is_transposed_linear(model.get_submodule(name.rpartition(".")[0]))
    return source.shape[::-1] if turned else source.shape


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a folder by the model's names, and how a model that is loaded from it is packed."""

    folder: Path
    config: QuantConfig
    tensors: Mapping[str, LazyTensor | Stored]

    @classmethod
    def open(cls, folder: Path, model: nn.Module, config: QuantConfig | None) -> Checkpoint:
        """For a model on the meta device. ConfigError if the folder is packed otherwise than `config` asks for.

        CheckpointError for tensors that do not fit the model (`tensors_for_model`), packing that is not bitsandbytes',
        and packed weights that cannot be read.
        """
        quantization, files = hub.quantization_config(folder), TensorFiles(folder)
        if quantization is None:
            return cls(folder, config or QuantConfig(), tensors_for_model(model, folder, files.stored))
        _check_is_bitsandbytes(quantization, folder)
        packed, statistics = stored_packed_weights(files.stored)
        absmax = stored_tensors(folder / ROWS_FILE) if (folder / ROWS_FILE).is_file() else {}
        rows = stored_int8_rows(files.stored, absmax)
        known: dict[str, Stored] = {**packed, **rows}
        plain = {name: tensor for name, tensor in files.stored.items() if name not in statistics.union(known)}
        settings = _as_stored(folder, model, config, packed, bool(rows))
        return cls(folder, settings, tensors_for_model(model, folder, plain, known))

    @property
    def originals(self) -> dict[str, LazyTensor]:
        """The tensors that lie there as a model had them before anything was packed; none of a packed checkpoint."""
        sources = {name: stored for name, stored in self.tensors.items() if not isinstance(stored, _PACKED)}
        return sources if len(sources) == len(self.tensors) else {}

    def plain(self, name: str) -> LazyTensor:
        """A tensor that the model holds as it is."""
        stored = self.tensors[name]
        assert not isinstance(stored, _PACKED)  # packed ones have a slot
        return stored

    def packed_weights(self, name: str, slot: Slot, dtype: torch.dtype) -> list[LazyPackedWeight]:
        """How the packed weight of a slot comes about: one, or one for each matrix of a stack.

        Each is turned round if the layer has it so; what is packed already lies as it is packed.
        """
        stored = self.tensors[name]
        if isinstance(stored, _PACKED):
            return [stored]
        matrices = [stored] if slot.stack is None else [stored.select(index) for index in range(stored.shape[0])]
        turned = [Transposed(matrix) if slot.transposed else matrix for matrix in matrices]
        return [PackedOnLoad(matrix, self.config, slot.format, dtype) for matrix in turned]

    def slots(self, model: nn.Module) -> list[Slot]:
        """What is packed of the model. CheckpointError for packed weights that are not a linear layer's there."""
        found = slots(model, self.config)
        names = {f"{name}.{slot.stack or 'weight'}" for slot in found for name in slot.modules}
        lost = [n for n, tensor in self.tensors.items() if isinstance(tensor, _PACKED) and n not in names]
        if lost:
            raise CheckpointError(f"{self.folder}: {_listed('are packed and belong to no linear layer', lost)}")
        return found


def _check_is_bitsandbytes(quantization: dict[str, Any], folder: Path) -> None:
    # Configs of before quant_method name the bits alone.
    bits = quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
    method = quantization.get("quant_method") or (BITSANDBYTES if bits else None)
    if method != BITSANDBYTES:
        raise CheckpointError(
            f"{folder} is packed by {method or 'a method that its config does not name'}, which cannot be read here; "
            f"name a checkpoint that is not packed, or one packed by {BITSANDBYTES}"
        )


def _as_stored(
    folder: Path, model: nn.Module, config: QuantConfig | None, packed: Mapping[str, StoredPackedWeight], rows: bool
) -> QuantConfig:
    """The settings that a packed folder is loaded with: format and layers are the file's, the rest is asked for."""
    formats = sorted({weight.format for weight in packed.values()})
    if len(formats) != 1:
        got = f"packed weights in {' and '.join(formats)}" if formats else "no packed weight"
        raise CheckpointError(f"{folder} says that it is packed by {BITSANDBYTES}, in one format; it has {got}")
    wanted = config or QuantConfig(format=formats[0])
    if wanted.format != formats[0]:
        raise ConfigError(
            f"{folder} is packed as {formats[0]} already; format {wanted.format!r} was asked for: ask for "
            f"{formats[0]!r}, or name the checkpoint that it was packed from"
        )
    layers = [name.removesuffix(".weight") for name in packed]
    if both := [name for name in layers for skip in wanted.skip_modules or () if answers_to(name, skip)]:
        raise ConfigError(f"{folder} holds layers packed that skip_modules leaves unpacked: {listing(both, SHOWN)}")
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) or is_transposed_linear(m)]
    embedding = "int8" if rows else wanted.embedding_format
    unpacked = tuple(name for name in linears if name not in layers)
    return replace(wanted, skip_modules=unpacked, embedding_format=embedding)


class CheckpointLike(Protocol):
    """What a model is filled from: a `Checkpoint`, or what stands for one."""

    @property
    def config(self) -> QuantConfig: ...

    @property
    def tensors(self) -> Mapping[str, Any]: ...

    def plain(self, name: str) -> LazyTensor: ...

    def packed_weights(self, name: str, slot: Slot, dtype: torch.dtype) -> list[LazyPackedWeight]: ...

    def slots(self, model: nn.Module) -> list[Slot]: ...


class _Placement:
    """Where the tensors of a checkpoint go: into packed weights, or as they are to every module that has them."""

    def __init__(self, model: nn.Module, checkpoint: CheckpointLike, dtype: torch.dtype, device: torch.device) -> None:
        self.model, self.checkpoint, self.dtype, self.device = model, checkpoint, dtype, device
        self._slots: dict[Tensor, Slot] = {slot.weight: slot for slot in checkpoint.slots(model)}
        self._names: dict[Tensor, list[str]] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            self._names.setdefault(tensor, []).append(name)

    def place(self, name: str, target: Tensor) -> None:
        """Reads a tensor for the one on meta that it replaces. QuantizationError for values that are not finite."""
        slot, config = self._slots.get(target), self.checkpoint.config
        if slot is not None:
            packed = [source.load(self.device) for source in self.checkpoint.packed_weights(name, slot, self.dtype)]
            for matrix in packed:
                matrix.int8_activations = config.int8_activations and matrix.format == config.format
            if slot.stack is None:
                slot.fill_(self.model, packed[0], config)
            else:
                slot.fill_stack_(self.model, packed, config)
            return
        stored = self.checkpoint.plain(name)
        dtype = self.dtype if stored.dtype.is_floating_point else target.dtype
        placed = torch.empty(stored.shape, dtype=dtype, device=self.device)
        for first, rows in read_slices(stored, READ_BYTES):
            part = placed[first : first + rows.shape[0]] if placed.dim() else placed
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
    more. A folder that bitsandbytes packed keeps its bytes: format, blocks and the choice of layers are then the
    file's (ConfigError if `config` asks for another format); what they are multiplied in is `config`'s.

    Raises CheckpointError for missing, unexpected or mis-shaped tensors, all listed, before anything is read;
    QuantizationError for values that are NaN, infinite, or too large for the format, with every tensor that has some.
    """
    set_host_limits()
    folder = hub.checkpoint_folder(path_or_id)
    described = hub.read_config(folder)
    model: Any = hub.empty_model(described, dtype)
    architecture.tie(model)
    checkpoint, identity = Checkpoint.open(folder, model, config), checkpoint_identity_or_error(folder, described)
    load_tensors_(model, checkpoint, dtype, torch.device(device))
    if isinstance(identity, CheckpointError):
        raise identity
    set_base_identity_(model, identity)
    hub.load_generation_config_(model, folder)
    model.config._name_or_path = str(folder.absolute())
    release_freed_pages()
    return model


def load_tensors_(model: Any, checkpoint: CheckpointLike, dtype: torch.dtype, device: torch.device) -> None:
    """Gives a model on meta the tensors of a checkpoint that fits it, packed where they are to be, and freezes it."""
    targets = model.state_dict(keep_vars=True)
    placement = _Placement(model, checkpoint, dtype, device)
    bad: list[str] = []
    for name in checkpoint.tensors:
        poll()
        target = targets.pop(name)  # whose place is taken, and which nothing else needs then
        try:
            placement.place(name, target)
        except QuantizationError as error:
            bad.append(str(error))
    if bad:
        raise QuantizationError(listing(bad, SHOWN, "; "))
    architecture.fill_computed_buffers_(model, device)
    model.requires_grad_(False)
