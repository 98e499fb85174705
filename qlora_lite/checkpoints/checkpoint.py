"""The tensors of a checkpoint folder, checked against a model before anything is read.

The step of a weight on its way in that brings together its forms on disk: plain tensors (conversion.py), which are
packed on load (pack_on_load.py), weights that bitsandbytes packed (layouts/bitsandbytes_layout.py), whose bytes are
kept, and stacks in MXFP4 (layouts/mxfp4_layout.py), which are read as plain tensors.
load.py fills a model from it, and export/ reads it row by row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.checkpoints import hub
from qlora_lite.checkpoints.conversion import converted_tensors
from qlora_lite.checkpoints.layouts.bitsandbytes_layout import (
    ROWS_FILE,
    StoredInt8Rows,
    StoredPackedWeight,
    stored_int8_rows,
    stored_packed_weights,
)
from qlora_lite.checkpoints.layouts.mxfp4_layout import METHOD as MXFP4
from qlora_lite.checkpoints.layouts.mxfp4_layout import unpacked_tensors
from qlora_lite.checkpoints.lazy_tensors import READ_BYTES, LazyTensor, transposed
from qlora_lite.checkpoints.pack_on_load import LazyPackedWeight, PackedOnLoad
from qlora_lite.checkpoints.safetensors_read import TensorFiles, stored_tensors
from qlora_lite.compute.slicing import slices_within
from qlora_lite.errors import CheckpointError, ConfigError, listing
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.experts import stacks
from qlora_lite.quantization.formats import eight_bit_format
from qlora_lite.quantization.quantize_model import WeightToPack, weights_to_pack
from qlora_lite.surgery import is_below, is_transposed_linear, left_out_towers, name_matches
from qlora_lite.tasks import creatable, in_label_head

SHOWN = 8
BITSANDBYTES = "bitsandbytes"


# A weight that is packed in the files.
StoredPacked = StoredPackedWeight | StoredInt8Rows
_STORED_PACKED = (StoredPackedWeight, StoredInt8Rows)


def _listed(problem: str, names: set[str] | list[str]) -> str:
    return f"{len(names)} tensors {problem}: {listing(sorted(names), SHOWN)}"


@dataclass(frozen=True)
class ModelTensors:
    """The tensors of a checkpoint by a model's names.

    passed_over: its tensors that the model has no place for. created: parameters of the model that it lacks and that
    start untrained (`tasks.creatable`). not_loaded: its tensors of towers that were left out of the model.
    """

    by_name: dict[str, LazyTensor | StoredPacked]
    passed_over: list[str]
    created: list[str]
    not_loaded: list[str]


def tensors_for_model(
    model: nn.Module,
    folder: Path,
    files: Mapping[str, LazyTensor],
    packed: Mapping[str, StoredPacked] | None = None,
    ignore_unexpected: bool = False,
) -> ModelTensors:
    """Returns the checkpoint's tensors by the names of an (empty) model, converted as transformers converts them.

    files: plain tensors, by name. packed: weights that are packed in the files. Tensors of the parts that the model of
    the folder's config has besides this one, such as a vision tower, are passed over, and with `ignore_unexpected` all
    that the model has no place for. A head of labels may be missing, or be one for another number of labels.

    Raises one CheckpointError that lists all tensors that are missing, unexpected, of the wrong shape, or converted by
    an operation that is not supported.
    """
    wanted: dict[str, Tensor] = model.state_dict(keep_vars=True)
    shapes = {name: tuple(tensor.shape) for name, tensor in wanted.items()}
    found = converted_tensors(model, shapes, files)
    tensors: dict[str, LazyTensor | StoredPacked] = {**found.tensors, **(packed or {})}
    ignorable = [re.compile(pattern) for pattern in architecture.ignorable_keys(model)]
    unexpected = [
        name
        for name, target in found.unexpected.items()
        if not any(pattern.search(name) or pattern.search(target) for pattern in ignorable)
    ]
    unexpected += [name for name in packed or {} if name not in shapes]
    towers = left_out_towers(model)
    not_loaded = [name for name in unexpected if is_below(found.unexpected.get(name, name), towers)]
    unexpected = [name for name in unexpected if name not in set(not_loaded)]
    passed_over = (
        unexpected if ignore_unexpected or not unexpected else _of_other_parts(model, folder, files, unexpected)
    )
    unexpected = [name for name in unexpected if name not in set(passed_over)]
    for name in in_label_head(model, tensors.keys() & shapes.keys()):
        if tensors[name].shape[1:] == shapes[name][1:] and tensors[name].shape != shapes[name]:
            del tensors[name]  # of another number of labels
    missing = shapes.keys() - tensors.keys() - architecture.tied_names(model) - found.failed
    created = creatable(model, missing)
    missing -= created
    wrong = [
        f"{name} is {tensor.shape}, the model has {shapes[name]}"
        for name, tensor in tensors.items()
        if name in shapes and _plain_shape(model, name, tensor) != shapes[name]
    ]
    # int8 codes without their statistics have the shape of a weight, and would be loaded as one.
    codes = [
        f"{name} is {tensor.dtype}"
        for name, tensor in found.tensors.items()
        if name in wanted and wanted[name].is_floating_point() and not tensor.dtype.is_floating_point
    ]
    lists = (
        ("are missing", missing),
        ("belong to no module", unexpected),
        ("have the wrong shape", wrong),
        ("hold integers where the model has floats", codes),
    )
    problems = [_listed(problem, names) for problem, names in lists if names]
    problems += _untied_pairs(model, tensors)
    problems += [listing(found.problems, SHOWN, "; ")] if found.problems else []
    if problems:
        hint = "; ignore_unexpected (--ignore-unexpected) passes over them" if unexpected and len(problems) == 1 else ""
        raise CheckpointError(f"{folder} does not fit this {type(model).__name__}: {'; '.join(problems)}{hint}")
    aliases = {alias for alias, name in architecture.tied_pairs(model) if name in tensors}
    fitting = {name: tensor for name, tensor in tensors.items() if name in shapes and name not in aliases}
    return ModelTensors(fitting, sorted(passed_over), sorted(created), sorted(not_loaded))


def _of_other_parts(model: nn.Module, folder: Path, files: Mapping[str, LazyTensor], names: list[str]) -> list[str]:
    """Returns those of these tensors that belong to the whole model of which this one is the language model."""
    whole = hub.whole_model(folder) if names else None
    if whole is None or type(whole) is type(model):
        return []
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    unknown = converted_tensors(whole, shapes, {name: files[name] for name in names if name in files}).unexpected
    return [name for name in names if name in files and name not in unknown]


def _untied_pairs(model: nn.Module, tensors: Mapping[str, LazyTensor | StoredPacked]) -> list[str]:
    """Describes weights that the config ties and whose values differ in the checkpoint."""
    return [
        f"{alias} and {name} are tied by the config and differ; set tie_word_embeddings to false in it to load both"
        for alias, name in architecture.tied_pairs(model)
        if alias in tensors and name in tensors and not _equal(tensors[alias], tensors[name])
    ]


def _equal(one: LazyTensor | StoredPacked, other: LazyTensor | StoredPacked) -> bool:
    if isinstance(one, _STORED_PACKED) or isinstance(other, _STORED_PACKED) or one.shape != other.shape:
        return False
    parts = slices_within(one.shape, one.dtype.itemsize, READ_BYTES)
    return all(bool((one.rows(part.start, part.stop) == other.rows(part.start, part.stop)).all()) for part in parts)


def _plain_shape(model: nn.Module, name: str, tensor: LazyTensor | StoredPacked) -> tuple[int, ...]:
    """Returns the shape of a tensor in a plain checkpoint. Packed, it is `(out, in)`, also for a transposed layer."""
    layer = name.rpartition(".")[0]
    transposed = isinstance(tensor, _STORED_PACKED) and is_transposed_linear(model.get_submodule(layer))
    return tensor.shape[::-1] if transposed else tensor.shape


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint folder by a model's names, and the settings by which the model is packed.

    passed_over: tensors of the files that the model has no place for. created: parameters of the model that the files
    lack and that start untrained (`tasks.creatable`). not_loaded: tensors of towers that were left out of the model.
    """

    folder: Path
    config: QuantConfig
    tensors: Mapping[str, LazyTensor | StoredPacked]
    passed_over: Sequence[str] = ()
    created: Sequence[str] = ()
    not_loaded: Sequence[str] = ()

    @classmethod
    def open(
        cls, folder: Path, model: nn.Module, config: QuantConfig | None, *, ignore_unexpected: bool = False
    ) -> Checkpoint:
        """Reads the headers of a folder's files for a model on the meta device.

        ignore_unexpected: pass over tensors that the model has no place for.

        Raises ConfigError if the folder is packed in another format than `config` asks for; CheckpointError if the
        tensors do not fit the model (`tensors_for_model`), if another library than bitsandbytes packed them, or if
        packed weights are damaged.
        """
        quantization, files = hub.quantization_config(folder), TensorFiles(folder)
        plain_files = _in_full_precision(files, quantization)
        if plain_files is not None or quantization is None:
            found = tensors_for_model(model, folder, plain_files or {}, None, ignore_unexpected)
            left = found.passed_over, found.created, found.not_loaded
            return cls(folder, config or QuantConfig(), found.by_name, *left)
        _check_is_bitsandbytes(quantization, folder)
        packed, statistics = stored_packed_weights(files.stored)
        absmax = stored_tensors(folder / ROWS_FILE) if (folder / ROWS_FILE).is_file() else {}
        rows = stored_int8_rows(files.stored, absmax)
        known: dict[str, StoredPacked] = {**packed, **rows}
        plain = {name: tensor for name, tensor in files.stored.items() if name not in statistics.union(known)}
        settings = _as_stored(folder, model, config, packed, bool(rows))
        found = tensors_for_model(model, folder, plain, known, ignore_unexpected)
        return cls(folder, settings, found.by_name, found.passed_over, found.created, found.not_loaded)

    @property
    def originals(self) -> dict[str, LazyTensor]:
        """The full-precision tensors by name; empty if any tensor of the checkpoint is packed."""
        plain = {name: stored for name, stored in self.tensors.items() if not isinstance(stored, _STORED_PACKED)}
        return plain if len(plain) == len(self.tensors) else {}

    @property
    def packed_layers(self) -> list[str]:
        """The names of the layers whose weights are packed in the files."""
        packed = [name for name, stored in self.tensors.items() if isinstance(stored, _STORED_PACKED)]
        return [name.removesuffix(".weight") for name in packed]

    def plain(self, name: str) -> LazyTensor:
        """Returns a tensor that the model does not pack."""
        stored = self.tensors[name]
        assert not isinstance(stored, _STORED_PACKED)  # packed tensors belong to a WeightToPack
        return stored

    def packed_weights(self, name: str, to_pack: WeightToPack, dtype: torch.dtype) -> list[LazyPackedWeight]:
        """Returns the packed form of a weight, unread; for a stack of experts, one for each matrix.

        dtype: what a plain weight is rounded to before it is packed. A transposed layer's weight is packed as
        `(out, in)`.
        """
        stored = self.tensors[name]
        if isinstance(stored, _STORED_PACKED):
            return [stored]
        matrices: list[LazyTensor] = [stored]
        if to_pack.stack is not None:
            matrices = [stored.select(index) for index in range(stored.shape[0])]
        if to_pack.transposed:
            matrices = [transposed(matrix) for matrix in matrices]
        return [PackedOnLoad(matrix, self.config, to_pack.format, dtype) for matrix in matrices]

    def weights_to_pack(self, model: nn.Module) -> list[WeightToPack]:
        """Returns the weights of a model to pack. Raises CheckpointError for packed weights without a layer."""
        found = weights_to_pack(model, self.config, self.packed_layers)
        names = {name for to_pack in found if to_pack.stack is None for name in to_pack.modules}
        unused = [name for name in self.packed_layers if name not in names]
        if unused:
            raise CheckpointError(f"{self.folder}: {_listed('are packed and belong to no linear layer', unused)}")
        return found


def _in_full_precision(
    files: TensorFiles, quantization: Mapping[str, object] | None
) -> Mapping[str, LazyTensor] | None:
    """Returns the tensors of a checkpoint by their names in the files; None if they are packed, but for MXFP4.

    MXFP4 has no other form that it was packed from: what it stands for are the values that were released.
    """
    if quantization is None:
        return files.stored
    return unpacked_tensors(files.stored) if quantization.get("quant_method") == MXFP4 else None


def full_precision_tensors(folder: Path) -> Mapping[str, LazyTensor] | None:
    """Returns the tensors of a folder by their names in its files, those in MXFP4 unpacked when they are read.

    None if the folder has no safetensors files, or if its weights are packed in another layout.
    """
    files = TensorFiles.of(folder)
    return None if files is None else _in_full_precision(files, hub.quantization_config(folder))


def _check_is_bitsandbytes(quantization: Mapping[str, object], folder: Path) -> None:
    # Older configs have no quant_method and name only the bits.
    bits = quantization.get("load_in_4bit") or quantization.get("load_in_8bit")
    method = quantization.get("quant_method") or (BITSANDBYTES if bits else None)
    if method != BITSANDBYTES:
        raise CheckpointError(
            f"{folder} is packed by {method or 'a method that its config does not name'}, which cannot be read; "
            f"name a checkpoint that is not packed, or one packed by {BITSANDBYTES} or in {MXFP4}"
        )


def _as_stored(
    folder: Path, model: nn.Module, config: QuantConfig | None, packed: Mapping[str, StoredPackedWeight], rows: bool
) -> QuantConfig:
    """Returns the settings for a packed folder: format and packed layers as in its files, the rest as in `config`."""
    formats = sorted({weight.format for weight in packed.values()})
    if len(formats) != 1:
        got = f"packed weights in {' and '.join(formats)}" if formats else "no packed weight"
        raise CheckpointError(f"the config of {folder} says that {BITSANDBYTES} packed it, in one format; it has {got}")
    wanted = config or QuantConfig(format=formats[0])
    if wanted.format != formats[0]:
        raise ConfigError(
            f"{folder} is packed as {formats[0]} already; format {wanted.format!r} was asked for: ask for "
            f"{formats[0]!r}, or name the checkpoint that it was packed from"
        )
    layers = [name.removesuffix(".weight") for name in packed]
    if both := [name for name in layers for skip in wanted.skip_modules or () if name_matches(name, skip)]:
        raise ConfigError(f"{folder} has packed layers that skip_modules excludes from packing: {listing(both, SHOWN)}")
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) or is_transposed_linear(m)}
    # A layer that shares the weight of a packed one, as the config may say, is not in the files and is packed with it.
    shared = {linears[name].weight for name in layers if name in linears}
    embedding = eight_bit_format().name if rows else wanted.embedding_format
    unpacked = tuple(name for name, module in linears.items() if module.weight not in shared)
    # bitsandbytes packs no stacks of experts.
    return replace(wanted, skip_modules=(*unpacked, *stacks(model)), embedding_format=embedding)
