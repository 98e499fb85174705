"""`save_quantized`: writes a packed model as a checkpoint that transformers and `load_quantized` load as pre-quantized.

Packed bytes are written unchanged, under the names of checkpoints/layouts/bitsandbytes_layout.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.checkpoints import hub
from qlora_lite.checkpoints.atomic_folder import check_free_space, check_output_is_not_input, new_folder
from qlora_lite.checkpoints.base_identity import write_packed_base_identity
from qlora_lite.checkpoints.checkpoint import BITSANDBYTES
from qlora_lite.checkpoints.layouts.bitsandbytes_layout import ROWS_FILE, bitsandbytes_tensors, int8_rows_recoverable
from qlora_lite.checkpoints.lazy_tensors import READ_BYTES
from qlora_lite.checkpoints.safetensors_write import (
    DEFAULT_SHARD_BYTES,
    PlannedTensor,
    planned,
    write_safetensors,
    write_sharded,
)
from qlora_lite.checks import check_finite, is_count, require
from qlora_lite.compute.slicing import slices_within
from qlora_lite.errors import CheckpointError, ConfigError, QuantizationError, listing
from qlora_lite.export.companion_files import write_calibration, write_companion_files, write_export_card
from qlora_lite.export.plain_weights import Holder, weights_to_write
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.experts import PackedStack
from qlora_lite.quantization.formats import UNPACKED, either, embedding_formats, format_named, formats_where
from qlora_lite.quantization.layers import QuantizedEmbedding, QuantizedLinear
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.sharding.base import check_whole
from qlora_lite.signals import check_signals
from qlora_lite.surgery import check_towers_loaded, distinct_ends, matches_as_in_transformers

SHOWN = 8


def check_formats(config: QuantConfig) -> None:
    """Raises ConfigError for formats that `save_quantized` cannot write, before a model is loaded in them."""
    names = formats_where(lambda row: row.bitsandbytes is not None)
    require(
        config.format in names, f"the format of a packed checkpoint must be one of {', '.join(names)}", config.format
    )
    tables = [*filter(_is_8bit, embedding_formats()), UNPACKED]
    choice = f"the embedding_format of a packed checkpoint must be {either(*tables)}"
    require(config.embedding_format in tables, choice, config.embedding_format)


def _is_8bit(format: str) -> bool:
    return format_named(format).bitsandbytes == "8bit"


def _skips_for(model: nn.Module, packed_stacks: Sequence[str]) -> list[str]:
    """Returns the `skip_modules` with which the modules of these stacks stay unpacked, and the output head."""
    head = architecture.output_head(model)
    heads = [name for name, module in model.named_modules() if module is head and isinstance(module, nn.Linear)]
    linears = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    return [*distinct_ends((name.rpartition(".")[0] for name in packed_stacks), linears), *heads]


@dataclass(frozen=True)
class _PackedLayers:
    """The packed layers of a model.

    linears: by name. row_weights: ids of the int8 weights, such as embeddings, that bitsandbytes has no layer for.
    """

    linears: dict[str, QuantizedLinear]
    row_weights: set[int]

    @classmethod
    def of(cls, model: nn.Module) -> _PackedLayers:
        """Raises ConfigError unless all packed linear layers but the head have one format, and no stack is packed."""
        modules = dict(model.named_modules(remove_duplicate=False))
        if stacks := [name for name, module in modules.items() if isinstance(module, PackedStack)]:
            skips = _skips_for(model, stacks)
            raise ConfigError(
                f"{len(stacks)} stacks of experts are packed, for which bitsandbytes has no names ({stacks[0]}); "
                f"leave them unpacked with skip_modules={skips} (--skip-modules {','.join(skips)}), or write the whole "
                f"model unpacked with export_merged"
            )
        packed = {name: module for name, module in modules.items() if isinstance(module, QuantizedLinear)}
        embeddings = {id(module.weight) for module in modules.values() if isinstance(module, QuantizedEmbedding)}
        head = architecture.output_head(model)
        own = [layer for layer in packed.values() if id(layer.weight) not in embeddings]
        is_rows = {id(layer) for layer in own if layer is head and _is_8bit(layer.weight.format) and len(own) > 1}
        formats = sorted({layer.weight.format for layer in own if id(layer) not in is_rows})
        if len(formats) != 1:
            got = (
                f"layers in {' and '.join(formats)}" if formats else "no packed layer; export_merged writes plain ones"
            )
            raise ConfigError(f"a packed checkpoint holds layers in one format; this model has {got}")
        tables = [module.weight for module in modules.values() if isinstance(module, QuantizedEmbedding)]
        unnamed = {weight.format for weight in tables if not _is_8bit(weight.format)}
        unnamed |= {format for format in formats if format_named(format).bitsandbytes is None}
        if unnamed:
            raise ConfigError(
                f"bitsandbytes has no names for weights in {listing(sorted(unnamed))}; "
                f"export_merged writes them unpacked"
            )
        row_weights = embeddings | {id(layer.weight) for layer in own if layer.weight.format != formats[0]}
        linears = {name: layer for name, layer in packed.items() if id(layer.weight) not in row_weights}
        return cls(linears, row_weights)

    @property
    def format(self) -> str:
        return next(iter(self.linears.values())).weight.format


def _skipped(model: nn.Module, layers: _PackedLayers) -> list[str]:
    """Returns the linear layers that transformers must not take for packed ones.

    Raises CheckpointError if the patterns for these also match a packed layer.
    """
    # transformers packs GPT-2's Conv1D like a linear layer.
    kinds = (nn.Linear, QuantizedLinear)
    modules = model.named_modules(remove_duplicate=False)
    linears = [name for name, module in modules if isinstance(module, kinds) or type(module).__name__ == "Conv1D"]
    skipped = [name for name in linears if name not in layers.linears]
    patterns = [*skipped, *architecture.kept_unpacked(model)]
    matched = [name for name in layers.linears if matches_as_in_transformers(name, patterns)]
    if matched:
        raise CheckpointError(
            f"transformers would take these packed layers for unpacked ones by their names: {listing(matched, SHOWN)}; "
            f"pack {listing(patterns, SHOWN)} too, or export_merged"
        )
    return skipped


def _quantization_config(layers: _PackedLayers, skipped: list[str], compute: torch.dtype) -> dict[str, object]:
    """Returns `quantization_config` as transformers' BitsAndBytesConfig saves it. compute: the dtype of products."""
    common: dict[str, object] = {"quant_method": BITSANDBYTES, "llm_int8_skip_modules": skipped}
    if _is_8bit(layers.format):
        return {**common, "load_in_8bit": True, "load_in_4bit": False}
    return {
        **common,
        "load_in_8bit": False,
        "load_in_4bit": True,
        "bnb_4bit_quant_type": layers.format,
        "bnb_4bit_use_double_quant": any(layer.weight.double_quant for layer in layers.linears.values()),
        "bnb_4bit_compute_dtype": str(compute).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
    }


@dataclass
class _Plan:
    """The tensors of the checkpoint, and the absmax of rows that are written unpacked."""

    tensors: dict[str, PlannedTensor] = field(default_factory=dict)
    absmax: dict[str, PlannedTensor] = field(default_factory=dict)

    def add(self, name: str, holder: Holder, layers: _PackedLayers, dtype: torch.dtype, compute: torch.dtype) -> None:
        """Adds a tensor. compute: the dtype to which bitsandbytes unpacks the packed weights."""
        if not isinstance(holder, PackedWeight):
            assert isinstance(holder, Tensor)  # packed stacks are refused
            check_finite(holder, name)
            self.tensors[name] = planned(holder)
        elif id(holder) not in layers.row_weights:
            self.tensors |= bitsandbytes_tensors(name, holder, compute)
        else:
            if not int8_rows_recoverable(holder.absmax, dtype):
                raise QuantizationError(f"{name} has rows too small for {dtype}; load the model in bfloat16 to save it")
            self.tensors[name] = PlannedTensor(tuple(holder.shape), dtype, lambda: _unpacked(holder, dtype))
            self.absmax[name] = planned(holder.absmax)

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.tensors.values(), *self.absmax.values()))


def _unpacked(packed: PackedWeight, dtype: torch.dtype) -> Iterator[Tensor]:
    for part in slices_within(packed.shape, torch.float32.itemsize, READ_BYTES, packed.row_step):
        yield packed.dequantize_rows(part.start, part.stop, dtype)


def save_quantized(
    model: Any, folder: str | Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES, overwrite: bool = False
) -> list[str]:
    """Writes a packed transformers model, its packed bytes unchanged; returns the names of the tensor files.

    Packed layers have the names that bitsandbytes gives them: `AutoModelForCausalLM.from_pretrained` and
    `load_quantized` load them as pre-quantized. The folder also gets config, generation config, tokenizer, and the
    identity of the checkpoint that was packed (base_identity.py).

    bitsandbytes has no names for an embedding in int8 rows, for a head that shares these, or for an int8 head above
    4-bit layers. They are written unpacked in the model's dtype, with the absmax of each row in a separate file.
    transformers then computes with the same values as this model, and `load_quantized` restores the int8 codes exactly.
    With int8 layers transformers also rounds activations to int8, which this model does only if asked to.

    Raises ConfigError for a model with adapters, which a packed checkpoint cannot hold, and for layers in several
    formats or none; QuantizationError for NaN or infinity; CheckpointError if the disk has too little space, or if the
    folder is not empty (unless `overwrite`), which is then left as it was.
    """
    require(is_count(max_shard_bytes, 1), "max_shard_bytes must be an integer of at least 1", max_shard_bytes)
    if getattr(model, "config", None) is None:
        raise ConfigError(f"save_quantized needs a transformers model with a config; got a {type(model).__name__}")
    if adapted := sum(isinstance(module, LoraLayer) for module in model.modules()):
        raise ConfigError(
            f"{adapted} layers have adapters, which a packed checkpoint cannot hold; save_adapter writes them, "
            f"export_merged merges them, and after remove_lora_ save_quantized writes the base under them"
        )
    check_towers_loaded(model, "a packed checkpoint")
    check_whole(model, "save_quantized")
    source = hub.model_folder(model)
    check_output_is_not_input(Path(folder), source)
    layers = _PackedLayers.of(model)
    dtype = model.dtype
    compute = next(iter(layers.linears.values())).compute_dtype or dtype
    quantization = _quantization_config(layers, _skipped(model, layers), compute)
    plan = _Plan()
    weights, _ = weights_to_write(model)  # without adapters, tied weights stay tied
    for weight in weights:
        check_signals()
        plan.add(weight.name, weight.holder, layers, dtype, compute)
    with new_folder(Path(folder), overwrite) as temporary:
        check_free_space(Path(folder), plan.nbytes())
        files = write_sharded(temporary, plan.tensors, max_shard_bytes)
        if plan.absmax:
            (temporary / ROWS_FILE).parent.mkdir()
            write_safetensors(temporary / ROWS_FILE, plan.absmax)
            files.append(ROWS_FILE)
        write_companion_files(model, source, temporary, dtype, quantization, is_whole=False)
        write_packed_base_identity(temporary, model)
        write_calibration(model, source, temporary)
        made = {
            "packed as": layers.format,
            "packed layers": len(layers.linears),
            "other tensors": str(dtype).removeprefix("torch."),
        }
        write_export_card(model, source, temporary, Path(folder), "quantized", [BITSANDBYTES, layers.format], made)
    return files
