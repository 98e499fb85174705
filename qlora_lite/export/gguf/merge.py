"""Writes a trained model as one GGUF file, for llama.cpp and ollama.

`export_gguf` takes a model in memory, `merge_checkpoint_to_gguf` a checkpoint and an adapter on disk. Both plan the
merged tensors as for any export (export/merged.py), and write them under llama.cpp's names, a tensor at a time. The
file is read back with the `gguf` package before its folder gets its name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_lite import architecture
from qlora_lite.checkpoints import hub
from qlora_lite.checkpoints.atomic_folder import check_free_space, check_output_is_not_input, new_folder
from qlora_lite.checkpoints.files import write_json
from qlora_lite.checkpoints.safetensors_write import DEFAULT_SHARD_BYTES
from qlora_lite.checks import require
from qlora_lite.data.encoding import TokenizedExample
from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.export.checkpoint_names import CHECKPOINT
from qlora_lite.export.gguf.families import Family, family_of, model_settings
from qlora_lite.export.gguf.library import (
    FLOATS,
    TYPES,
    GgufTensor,
    Settings,
    WrittenTensor,
    check_file,
    gguf,
    write_gguf,
)
from qlora_lite.export.gguf.modelfile import model_modelfile, sampling, stop_texts, write_modelfile
from qlora_lite.export.gguf.read_back import by_model_names, empty_model, read_back
from qlora_lite.export.gguf.rope import rope_tensors
from qlora_lite.export.gguf.tensors import EMBEDDING, gguf_tensors, stays_fp32
from qlora_lite.export.gguf.tokenizer import tokenizer_settings
from qlora_lite.export.merged import (
    AS_SAVED,
    PlannedExport,
    check_options,
    planned_checkpoint,
    planned_model,
)
from qlora_lite.export.report import REPORT_FILE, MergeReport
from qlora_lite.export.verify import DEQUANTIZED, Verification, check_examples, compare
from qlora_lite.quantization.config import QuantConfig


@dataclass(frozen=True)
class GgufExport:
    """What was written: the name of the file, the architecture that llama.cpp computes it with, and the tensors of each
    type.

    relative_error: norm of what packing changed over the norm of what was packed, None for types of floats. report,
    untied, verification, passed_over: as in `Exported`.
    """

    file: str
    architecture: str
    types: dict[str, int]
    bytes: int
    relative_error: float | None
    report: MergeReport
    untied: bool
    verification: Verification | None = None
    passed_over: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        """Returns the entry `gguf` of `merge_report.json`."""
        return {
            "file": self.file,
            "architecture": self.architecture,
            "tensors": self.types,
            "bytes": self.bytes,
            "relative_error": self.relative_error,
            "read_back": "equal",
        }


def check_type(type: str, types: tuple[str, ...] = TYPES) -> None:
    """Raises ConfigError for a type that does not exist, and where the `gguf` package is missing."""
    require(type in types, f"the type of a GGUF file must be {', '.join(types[:-1])} or {types[-1]}", type)
    gguf()


def export_gguf(
    model: nn.Module,
    folder: str | Path,
    type: str = "f16",
    *,
    base: str = DEQUANTIZED,
    overwrite: bool = False,
    verify: Sequence[TokenizedExample] | None = None,
    name: str | None = None,
) -> GgufExport:
    """Writes W0 + scaling * B A of every layer, with settings and tokenizer, as one GGUF file in a new folder.

    type: `f32`, `f16`, `bf16`, `q8_0` or `q4_0` (four bits; embedding and head get eight). Vectors, norms and routers
    are f32, and a weight whose rows are no multiple of 32 values is f16. base, name: as in `export_merged`. verify:
    too; the model that is compared has the values of the file. The folder also gets `merge_report.json` and a Modelfile
    for ollama. The file is read back and compared. The model is not changed.

    Raises CheckpointError, before anything is written, for a family that is not known and for a config, a tokenizer or
    a tensor that llama.cpp would read as something else; the other errors of `export_merged`.
    """
    check_options(base, CHECKPOINT, torch.float32, DEFAULT_SHARD_BYTES)
    check_type(type)
    config = getattr(model, "config", None)
    if config is None:
        raise ConfigError(f"export needs a transformers model with a config; got a {model.__class__.__name__}")
    family = family_of(config)
    dtype = FLOATS.get(type, torch.float32)
    with planned_model(model, base, dtype, AS_SAVED, name, stays_fp32) as planned:
        return _write(planned, Path(folder), family, type, overwrite, verify)


def merge_checkpoint_to_gguf(
    path_or_id: str | Path,
    adapter: str | Path,
    folder: str | Path,
    config: QuantConfig | None = None,
    type: str = "f16",
    *,
    base: str = DEQUANTIZED,
    load_dtype: torch.dtype = torch.bfloat16,
    overwrite: bool = False,
    verify: Sequence[TokenizedExample] | None = None,
    any_base: bool = False,
    ignore_unexpected: bool = False,
) -> GgufExport:
    """Writes, without loading the model, what `export_gguf` writes of a model loaded with `config` and the adapter.

    load_dtype, any_base, ignore_unexpected: as in `merge_checkpoint`. Raises the errors of that and of `export_gguf`.
    """
    check_options(base, CHECKPOINT, torch.float32, DEFAULT_SHARD_BYTES)
    check_type(type)
    source = hub.checkpoint_folder(path_or_id)
    check_output_is_not_input(Path(folder), source, Path(adapter))
    family = family_of(hub.read_config(source))
    dtype = FLOATS.get(type, torch.float32)
    planned = planned_checkpoint(
        source, adapter, config, dtype, base, AS_SAVED, load_dtype, any_base, ignore_unexpected, stays_fp32
    )
    return _write(planned, Path(folder), family, type, overwrite, verify)


def _settings(planned: PlannedExport, family: Family, tensors: list[GgufTensor], type: str) -> Settings:
    """Returns all settings of a file. Raises CheckpointError for a tokenizer that llama.cpp does not have."""
    config: Any = planned.model.config
    rows = next(tensor.shape[0] for tensor in tensors if tensor.name == EMBEDDING)
    if planned.source is None:
        raise CheckpointError(
            "a GGUF file holds the tokenizer, and the model came from no folder that has one; set "
            "model.config._name_or_path to one"
        )
    general = {"type": "model", "name": planned.source.resolve().name}
    settings = model_settings(config, family, type, rows)
    return {**general, **settings, **tokenizer_settings(planned.source, config, rows)}


def _write(
    planned: PlannedExport,
    folder: Path,
    family: Family,
    type: str,
    overwrite: bool,
    examples: Sequence[TokenizedExample] | None,
) -> GgufExport:
    check_output_is_not_input(folder, planned.source)
    plan, model = planned.plan, planned.model
    if architecture.output_head(model) is None:  # llama.cpp would take the embedding for one
        raise CheckpointError(
            f"a GGUF file is written of causal language models; a {model.__class__.__name__} has no output head"
        )
    if examples is not None:
        check_examples(examples, model, architecture.vocabulary_size(model))
    config: Any = model.config
    tensors = [*rope_tensors(config), *gguf_tensors(plan.tensors, family, config, type)]
    settings = _settings(planned, family, tensors, type)
    generation = getattr(model, "generation_config", None)
    stops = stop_texts(generation, settings["token_list"])
    file = f"model-{type}.gguf"
    with new_folder(folder, overwrite) as temporary:
        check_free_space(folder, sum(tensor.bytes_written for tensor in tensors))
        with plan.packing_ahead():
            written = write_gguf(temporary / file, family.architecture, settings, tensors)
        check_file(temporary / file, written)
        verification = None if examples is None else _verified(temporary / file, planned, family, examples)
        write_modelfile(temporary, model_modelfile(file, stops, sampling(generation)))
        report, size = _report(plan.report(), type), (temporary / file).stat().st_size
        done = GgufExport(
            file,
            family.architecture,
            _counted(tensors),
            size,
            _relative_error(written),
            report,
            plan.untied,
            verification,
            planned.passed_over,
        )
        verified = {} if verification is None else {"verify": verification.to_json()}
        write_json(temporary / REPORT_FILE, {**report.to_json(), "gguf": done.to_json(), **verified})
    return done


def _verified(path: Path, planned: PlannedExport, family: Family, examples: Sequence[TokenizedExample]) -> Verification:
    """Compares the model that has the file's values with the adapter model."""
    plan, model = planned.plan, planned.model
    empty = empty_model(model, plan.untied)
    read = by_model_names(empty, read_back(path, plan.tensors, family, model.config))
    return compare(empty, plan.compared(read), examples, plan.base)


def _report(report: MergeReport, type: str) -> MergeReport:
    """Returns the figures of the merge, which end before packing."""
    return report if type in FLOATS else replace(report, dtype=f"{report.dtype}, then packed as {type}")


def _counted(tensors: list[GgufTensor]) -> dict[str, int]:
    """Returns the number of tensors of each type."""
    found = {type: sum(tensor.type == type for tensor in tensors) for type in TYPES}
    return {type: count for type, count in found.items() if count}


def _relative_error(written: list[WrittenTensor]) -> float | None:
    squares = sum(tensor.squares for tensor in written)
    return (sum(tensor.error for tensor in written) / squares) ** 0.5 if squares else None
