"""Writes a trained model as an ordinary checkpoint, W0 + scaling * B A, a few rows at a time.

The step of a weight on its way out between plan.py and safetensors_write.py. `export_merged` takes a model in memory,
`merge_checkpoint` a checkpoint and an adapter on disk, of which it never holds a whole tensor. Both plan every tensor
first, then write it, summed in fp32 and cast. With `verify`, the files are read back and compared with the adapter
model (verify.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from qlora_lite import architecture
from qlora_lite.checkpoints import hub
from qlora_lite.checkpoints.atomic_folder import check_free_space, check_output_is_not_input, new_folder
from qlora_lite.checkpoints.base_identity import (
    check_trained_on_checkpoint,
    repacked_weights,
)
from qlora_lite.checkpoints.checkpoint import Checkpoint, full_precision_tensors
from qlora_lite.checkpoints.files import write_json
from qlora_lite.checkpoints.lazy_tensors import LazyTensor
from qlora_lite.checkpoints.safetensors_write import DEFAULT_SHARD_BYTES, write_sharded
from qlora_lite.checks import FLOAT_DTYPES, is_count, require
from qlora_lite.compute.host_memory import set_host_limits
from qlora_lite.data.encoding import TokenizedExample
from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.export.checkpoint_names import CHECKPOINT, MODEL, NAMES, CheckpointNames
from qlora_lite.export.companion_files import write_companion_files, write_export_card
from qlora_lite.export.model_weights import (
    ModelInMemory,
    ModelOnDisk,
    check_repacked_base,
    check_same_base,
    lazy_updates_,
)
from qlora_lite.export.plain_weights import PlainWeight
from qlora_lite.export.plan import ExportPlan
from qlora_lite.export.report import REPORT_FILE, MergeReport
from qlora_lite.export.verify import BASES, DEQUANTIZED, ORIGINAL, Verification, check_examples, compare
from qlora_lite.lora.multi_adapter import active_adapter, using_adapter
from qlora_lite.lora.peft.options import adapter_task, labels_of_adapter
from qlora_lite.lora.peft.save_load import load_adapter_
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.sharding.base import check_whole
from qlora_lite.surgery import check_towers_loaded
from qlora_lite.tasks import CAUSAL_LM, IMAGE_TEXT_TO_TEXT, task_of

# The names of transformers' `save_pretrained`, whatever names the checkpoint has: those that converters know.
AS_SAVED = "as saved"


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    files: names of the tensor files. report: figures of every weight. untied: whether tied weights were written apart,
    because an adapter is on one of them. verification: the comparison of logits, if one was asked for. passed_over:
    tensors of the checkpoint on disk that the model has no place for.
    """

    files: list[str]
    report: MergeReport
    untied: bool
    verification: Verification | None = None
    passed_over: tuple[str, ...] = ()


@dataclass(frozen=True)
class PlannedExport:
    """A model, the folder that it came from, and the plan of its export. passed_over: as in `Exported`."""

    model: nn.Module
    source: Path | None
    plan: ExportPlan
    passed_over: tuple[str, ...] = ()


def check_options(base: str, names: str, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """Raises ConfigError for a setting of an export that does not exist."""
    require(base in BASES, f"base must be {' or '.join(BASES)}", base)
    require(names in NAMES, f"names must be {' or '.join(NAMES)}", names)
    if dtype not in FLOAT_DTYPES.values():
        raise ConfigError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}; got {dtype}")
    require(is_count(max_shard_bytes, 1), "max_shard_bytes must be an integer of at least 1", max_shard_bytes)


def _check_has_originals(source: Path, base: str) -> None:
    if base == ORIGINAL and hub.quantization_config(source) is not None and full_precision_tensors(source) is None:
        raise CheckpointError(
            f"base='original' merges into full-precision weights and {source} holds packed ones; merge into "
            f"base='dequantized', or into the checkpoint that it was packed from"
        )


def _plain_files(source: Path | None) -> Mapping[str, LazyTensor] | None:
    """Returns the tensors of a folder by their names; None if it has none, or if they are packed."""
    return None if source is None else full_precision_tensors(source)


def _originals(
    model: nn.Module, source: Path | None, base: str, stored: CheckpointNames | None
) -> Mapping[str, LazyTensor]:
    """Returns the tensors that a model was packed from, by the model's names; empty if its folder has none.

    stored: the tensors of the folder, None if it has none in full precision.
    """
    if source is not None:
        _check_has_originals(source, base)
    # LoftQ packed the checkpoint's weight less its adapter's, so this adapter belongs to the packed weights alone.
    repacked = bool(repacked_weights(model))
    if repacked and base == ORIGINAL:
        raise CheckpointError("base='original' has no meaning for an adapter on a base that LoftQ packed anew")
    if base == ORIGINAL and stored is None:
        raise CheckpointError("base='original' needs the checkpoint that the model was loaded from; it has none")
    return {} if stored is None or repacked else stored.converted.tensors


def _written_names(
    model: nn.Module, names: str, stored: Callable[[], CheckpointNames | None]
) -> CheckpointNames | None:
    """Returns how the export has the model's tensors; None for the model's own names. stored: of the checkpoint."""
    if names == MODEL:
        return None
    return (stored() if names == CHECKPOINT else None) or CheckpointNames(model, None)


@contextmanager
def planned_model(
    model: nn.Module,
    base: str,
    dtype: torch.dtype,
    names: str,
    name: str | None = None,
    in_fp32: Callable[[PlainWeight], bool] = lambda weight: False,
) -> Iterator[PlannedExport]:
    """Within the block, plans the export of a model in memory with one of its adapters active (`export_merged`).

    names: also `AS_SAVED`. in_fp32: as in `ExportPlan.of`. Nothing is computed before the plan's tensors are read.
    """
    check_whole(model, "an export")
    source = hub.model_folder(model)
    with using_adapter(model, active_adapter(model) if name is None else name):
        files = _plain_files(source)
        stored = None if files is None else CheckpointNames(model, files)
        originals = _originals(model, source, base, stored)
        written = _written_names(model, names, lambda: stored)
        yield PlannedExport(
            model, source, ExportPlan.of(model, base, dtype, ModelInMemory(), originals, written, in_fp32)
        )


def planned_checkpoint(
    path_or_id: str | Path,
    adapter: str | Path,
    config: QuantConfig | None,
    dtype: torch.dtype,
    base: str,
    names: str,
    load_dtype: torch.dtype = torch.bfloat16,
    any_base: bool = False,
    ignore_unexpected: bool = False,
    in_fp32: Callable[[PlainWeight], bool] = lambda weight: False,
) -> PlannedExport:
    """Plans the export of a checkpoint and an adapter on disk (`merge_checkpoint`); no tensor is read for it.

    names: also `AS_SAVED`. in_fp32: as in `ExportPlan.of`.
    """
    set_host_limits()
    source = hub.checkpoint_folder(path_or_id)
    if not any_base:
        check_trained_on_checkpoint(Path(adapter), source)
    model = _model_for_adapter(source, Path(adapter), load_dtype)
    architecture.tie(model)
    _check_has_originals(source, base)
    checkpoint = Checkpoint.open(source, model, config, ignore_unexpected=ignore_unexpected)
    architecture.initialize_(model, checkpoint.created, torch.device("cpu"))
    created = {name: model.get_parameter(name).detach() for name in checkpoint.created}
    weights_to_pack = checkpoint.weights_to_pack(model)
    adapted = load_adapter_(model, adapter, any_base=True)  # checked above
    check_repacked_base(Path(adapter), adapted, checkpoint, weights_to_pack, load_dtype)
    check_same_base(Path(adapter), model, checkpoint, weights_to_pack, load_dtype)
    held = ModelOnDisk(weights_to_pack, checkpoint, load_dtype, lazy_updates_(model, adapter), created)
    hub.load_generation_config_(model, source)
    written = _written_names(model, names, lambda: CheckpointNames(model, _plain_files(source)))
    plan = ExportPlan.of(model, base, dtype, held, checkpoint.originals, written, in_fp32)
    return PlannedExport(model, source, plan, tuple(checkpoint.passed_over))


def _check_verifiable(model: nn.Module) -> None:
    """Raises ConfigError for a model whose outputs are not the logits of next tokens."""
    if (task := task_of(model)) not in (CAUSAL_LM, IMAGE_TEXT_TO_TEXT):
        raise ConfigError(
            f"verify compares the logits of next tokens, and the task of a {type(model).__name__} is {task.name}; "
            f"export it without, and compare its outputs in transformers"
        )


def _model_for_adapter(source: Path, adapter: Path, dtype: torch.dtype) -> nn.Module:
    """Returns the empty model that an adapter belongs to: of a classifier's, one with a head for its labels."""
    config, task = hub.read_config(source), adapter_task(adapter)
    if task is None:
        return hub.empty_model(config, dtype)
    hub.set_labels_(config, labels_of_adapter(adapter))
    declared = hub.model_class(config)
    return hub.empty_model(config, dtype, declared if task in hub.tasks_of_class(declared, config) else task.name)


def _verified(folder: Path, plan: ExportPlan, examples: Sequence[TokenizedExample]) -> Verification:
    """Compares the model that transformers would load from the folder with the adapter model."""
    empty = hub.empty_model(hub.read_config(folder), torch.float32)
    architecture.tie(empty)
    written = Checkpoint.open(folder, empty, None)
    read_back = {name: written.plain(name) for name in written.tensors}
    return compare(empty, plan.compared(read_back), examples, plan.base)


def _write(
    model: nn.Module,
    source: Path | None,
    folder: Path,
    plan: ExportPlan,
    max_shard_bytes: int,
    overwrite: bool,
    examples: Sequence[TokenizedExample] | None,
) -> Exported:
    check_output_is_not_input(folder, source)
    if not plan.is_whole:
        check_towers_loaded(model, "an export without the names and files of the full-precision checkpoint")
    if examples is not None:
        _check_verifiable(model)
        check_examples(examples, model, architecture.vocabulary_size(model))
    with new_folder(folder, overwrite) as temporary:
        check_free_space(folder, sum(tensor.nbytes for tensor in plan.tensors.values()))
        with plan.packing_ahead():
            files = write_sharded(temporary, plan.tensors, max_shard_bytes, "merging")
        write_companion_files(model, source, temporary, plan.dtype, untie=plan.untied, is_whole=plan.is_whole)
        report = plan.report()
        verification = None if examples is None else _verified(temporary, plan, examples)
        verified = {} if verification is None else {"verify": verification.to_json()}
        write_json(temporary / REPORT_FILE, report.to_json() | verified)
        _write_card(model, source, temporary, folder, report, verification)
    return Exported(files, report, plan.untied, verification)


def _write_card(
    model: nn.Module,
    source: Path | None,
    target: Path,
    replaced: Path,
    report: MergeReport,
    verification: Verification | None,
) -> None:
    """Writes the model card of an export, or keeps the user's."""
    merged = sum(figures.update is not None for figures in report.tensors)
    base = {DEQUANTIZED: "as they were packed in training", ORIGINAL: "the checkpoint's own"}[report.base]
    agreement = None if verification is None else verification.merged[report.base]
    made: dict[str, object] = {
        "weights that the adapter was added to": base if merged else None,
        "tensors with an update": merged or None,
        "dtype": report.dtype,
        "held-out loss": None if agreement is None else agreement.loss,
    }
    more = f"`{REPORT_FILE}` has the figures of every tensor."
    tags = ["lora", "merged"] if merged else []
    write_export_card(model, source, target, replaced, "finetune" if merged else None, tags, made, more)


def export_merged(
    model: nn.Module,
    folder: str | Path,
    dtype: torch.dtype = torch.float16,
    *,
    base: str = DEQUANTIZED,
    names: str = CHECKPOINT,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    verify: Sequence[TokenizedExample] | None = None,
    name: str | None = None,
) -> Exported:
    """Writes W0 + scaling * B A of every layer, summed in fp32 and cast to `dtype`, as safetensors shards.

    base: `dequantized` adds the update to W0 as it was packed and trained on; `original` to the weights of the
    checkpoint that the model was loaded from, which are read from disk (a packed checkpoint has none).
    names: `checkpoint` writes the tensors under the names and in the pieces of the checkpoint that the model was loaded
    from, or, without one, those of transformers' `save_pretrained`; `model` those of the model in transformers 5.
    verify: held-out examples (`data.tokenize_all`). The export, read back from its files, and the merge into the other
    base are compared with the adapter model on them (verify.py) before the folder gets its name.
    name: the adapter to merge, of several (multi_adapter.py); None for the active one, which stays active.

    The folder also gets config, the checkpoint's companion files (companion_files.py) and `merge_report.json`, and
    loads with `AutoModelForCausalLM.from_pretrained`. If an adapter is on one of two tied weights (output head, input
    embedding), or on both, both are written, each with its own update, and `tie_word_embeddings` is False in the
    exported config. A slice of a tensor is computed at a time. The model is not changed.

    Raises QuantizationError, naming the tensor, for values above the range of `dtype` (fp16: 65,504); CheckpointError
    if the disk has too little space, if the original checkpoint is gone, for tensors that cannot be given the
    checkpoint's names, or if the folder is not empty (unless `overwrite`), which is then left as it was; ConfigError
    for examples that the model cannot be run on.
    """
    check_options(base, names, dtype, max_shard_bytes)
    if getattr(model, "config", None) is None:
        raise ConfigError(f"export needs a transformers model with a config; got a {type(model).__name__}")
    with planned_model(model, base, dtype, names, name) as planned:
        return _write(model, planned.source, Path(folder), planned.plan, max_shard_bytes, overwrite, verify)


def merge_checkpoint(
    path_or_id: str | Path,
    adapter: str | Path,
    folder: str | Path,
    config: QuantConfig | None = None,
    dtype: torch.dtype = torch.float16,
    *,
    base: str = DEQUANTIZED,
    names: str = CHECKPOINT,
    load_dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    verify: Sequence[TokenizedExample] | None = None,
    any_base: bool = False,
    ignore_unexpected: bool = False,
) -> Exported:
    """Writes, without loading the model, what `export_merged` writes of a model loaded with `config` and the adapter.

    The files are the same bit for bit. Rows are read, packed and unpacked as in training, merged and written, so memory
    does not grow with the size of the model. load_dtype: the dtype that the model was loaded in for training; it has
    no effect on `base='original'`. any_base: as in `load_adapter_`. ignore_unexpected: as in `load_quantized`.

    Raises the errors of `load_quantized`, `load_adapter_` and `export_merged`. A base other than the one that the
    adapter was trained on is refused first, from its files.
    """
    check_options(base, names, dtype, max_shard_bytes)
    check_output_is_not_input(Path(folder), hub.checkpoint_folder(path_or_id), Path(adapter))
    planned = planned_checkpoint(
        path_or_id, adapter, config, dtype, base, names, load_dtype, any_base, ignore_unexpected
    )
    plan, source = planned.plan, planned.source
    done = _write(planned.model, source, Path(folder), plan, max_shard_bytes, overwrite, verify)
    return replace(done, passed_over=planned.passed_over)
