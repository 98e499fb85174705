"""Out: what was trained as an ordinary checkpoint, written a few rows at a time, with what that cost in numbers.

`export_merged` takes a model in memory, `merge_checkpoint` a checkpoint and an adapter on disk, of which no tensor is
ever held whole. Both plan every tensor first (plan.py), then write it: W0 + scaling * B A, summed in fp32 and
cast. Asked to, they prove it: what was written is read back and compared with the adapter model (verify.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_lite import architecture
from qlora_lite.checkpoints import hub
from qlora_lite.checkpoints.atomic_folder import check_free_space, check_output_is_not_input, new_folder
from qlora_lite.checkpoints.base_identity import (
    LOAD_REPACKED_HINT,
    PACKED_HASH_KEY,
    check_trained_on_checkpoint,
    packed_weights_hash,
    repacked_weights,
)
from qlora_lite.checkpoints.checkpoint import Checkpoint
from qlora_lite.checkpoints.conversion import converted_tensors
from qlora_lite.checkpoints.files import read_json, write_json
from qlora_lite.checkpoints.lazy_tensors import READ_BYTES, LazyTensor, read_slices
from qlora_lite.checkpoints.safetensors_read import TensorFiles
from qlora_lite.checkpoints.safetensors_write import DEFAULT_SHARD_BYTES, write_sharded
from qlora_lite.checks import FLOAT_DTYPES, is_count, require
from qlora_lite.compute.host_memory import set_host_limits
from qlora_lite.data.tokenization import TokenizedExample
from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.export.plain_weights import plain_weights
from qlora_lite.export.plan import ExportPlan, ModelInMemory, ModelOnDisk, lazy_updates_
from qlora_lite.export.report import MergeReport
from qlora_lite.export.verify import BASES, DEQUANTIZED, ORIGINAL, Verification, check_examples, compare
from qlora_lite.lora.multi_adapter import active_adapter, using_adapter
from qlora_lite.lora.peft.keys import BASE_COPY, PREFIX, TOKEN_ADAPTER, adapter_tensors
from qlora_lite.lora.peft.options import CONFIG_FILE
from qlora_lite.lora.peft.save_load import load_adapter_
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.quantize_model import WeightToPack

REPORT_FILE = "merge_report.json"


@dataclass(frozen=True)
class Exported:
    """What was written: the names of the tensor files, the figures of every weight, what comparing logits gave.

    untied: whether weights that are tied in the model are two in the export, since an adapter is on one of them.
    """

    files: list[str]
    report: MergeReport
    untied: bool
    verification: Verification | None = None


def _check_options(base: str, dtype: torch.dtype, max_shard_bytes: int) -> None:
    require(base in BASES, f"base must be {' or '.join(BASES)}", base)
    if dtype not in FLOAT_DTYPES.values():
        raise ConfigError(f"dtype must be one of {', '.join(FLOAT_DTYPES)}; got {dtype}")
    require(is_count(max_shard_bytes, 1), "max_shard_bytes must be an integer of at least 1", max_shard_bytes)


def _check_has_originals(source: Path, base: str) -> None:
    if base == ORIGINAL and hub.quantization_config(source) is not None:
        raise CheckpointError(
            f"base='original' merges into full-precision weights and {source} holds packed ones; merge into "
            f"base='dequantized', or into the checkpoint that it was packed from"
        )


def _originals(model: nn.Module, source: Path | None, base: str) -> Mapping[str, LazyTensor]:
    """The full-precision tensors that a model was packed from, where its folder has them; by the model's names."""
    if source is not None:
        _check_has_originals(source, base)
    packed = source is not None and hub.quantization_config(source) is not None
    # What LoftQ packed is not the checkpoint's weight with an error, and its adapter belongs to that alone.
    own = bool(repacked_weights(model))
    if own and base == ORIGINAL:
        raise CheckpointError("base='original' has no meaning for an adapter on a base that LoftQ packed anew")
    stored = None if packed or own else TensorFiles.of(source)
    if base == ORIGINAL and stored is None:
        raise CheckpointError("base='original' needs the checkpoint that the model was loaded from; it has none")
    shapes = {weight.name: weight.shape for weight in plain_weights(model)}
    return {} if stored is None else converted_tensors(model, shapes, stored.stored).tensors


def _check_same_base(
    adapter: Path, model: nn.Module, checkpoint: Checkpoint, weights_to_pack: list[WeightToPack], dtype: torch.dtype
) -> None:
    """CheckpointError for unpacked base weights that came with the adapter and are not those of the checkpoint.

    `load_adapter_` compares them with a model's; on meta there is nothing to compare with.
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


def _check_own_base(
    adapter: Path, names: list[str], checkpoint: Checkpoint, weights_to_pack: list[WeightToPack], dtype: torch.dtype
) -> None:
    """CheckpointError for an adapter on a base that LoftQ packed anew, unless that base is the checkpoint."""
    digest = read_json(adapter / CONFIG_FILE).get(PACKED_HASH_KEY)
    if digest is None:
        return
    slot_of = {name: to_pack for to_pack in weights_to_pack for name in to_pack.modules}
    ordered, there = sorted(names), not checkpoint.originals and slot_of.keys() >= set(names)
    sources = ((name, checkpoint.packed_weights(f"{name}.weight", slot_of[name], dtype)[0]) for name in ordered)
    if not there or packed_weights_hash((name, source.load(torch.device("cpu"))) for name, source in sources) != digest:
        raise CheckpointError(
            f"{adapter} belongs to a base that LoftQ packed anew, which {checkpoint.folder} is not; "
            f"{LOAD_REPACKED_HINT}"
        )


def _verified(folder: Path, plan: ExportPlan, examples: Sequence[TokenizedExample]) -> Verification:
    """What transformers would build from the folder, on the folder's tensors, beside the model that was trained."""
    empty: Any = hub.empty_model(hub.read_config(folder), torch.float32)
    architecture.tie(empty)
    written = Checkpoint.open(folder, empty, None)
    read_back = {name: written.plain(name) for name in written.tensors}
    return compare(empty, plan.compared(read_back), examples, plan.base)


def _write(
    model: Any,
    source: Path | None,
    folder: Path,
    plan: ExportPlan,
    shard: int,
    overwrite: bool,
    examples: Sequence[TokenizedExample] | None,
) -> Exported:
    check_output_is_not_input(folder, source)
    if examples is not None:
        check_examples(examples, model.config, architecture.vocabulary_size(model))
    with new_folder(folder, overwrite) as temporary:
        check_free_space(folder, sum(tensor.nbytes for tensor in plan.tensors.values()))
        with plan.packing_ahead():
            files = write_sharded(temporary, plan.tensors, shard)
        hub.save_config_and_tokenizer(model, source, temporary, plan.dtype, untie=plan.untied)
        report = plan.report()
        found = None if examples is None else _verified(temporary, plan, examples)
        verify = {} if found is None else {"verify": found.to_json()}
        write_json(temporary / REPORT_FILE, report.to_json() | verify)
    return Exported(files, report, plan.untied, found)


def export_merged(
    model: nn.Module,
    folder: str | Path,
    dtype: torch.dtype = torch.float16,
    *,
    base: str = DEQUANTIZED,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    verify: Sequence[TokenizedExample] | None = None,
    name: str | None = None,
) -> Exported:
    """Writes W0 + scaling * B A of every layer, summed in fp32 and cast, as safetensors shards.

    base: `dequantized` writes into W0 as it was packed and trained on; `original` into the weights of the checkpoint
    that the model was loaded from, read from there; a packed checkpoint has none. The folder also gets config,
    generation config, tokenizer, chat template and `merge_report.json`, and loads with
    `AutoModelForCausalLM.from_pretrained`. Where an adapter is on one of two tied weights (output head, input
    embedding), or on each, both are written, each with its own update or none, and `tie_word_embeddings` is False in
    the exported config (not in the model's). A slice of a tensor is made at a time; the model is not changed, and
    need not be merged.
    verify: held-out examples (`data.tokenize_all`) on which this export, read back from its files, and the merge into
    the other base are compared with the adapter model (verify.py) before the folder gets its name.
    name: of several adapters (multi_adapter.py), the one to merge; None: the one in use, which it is afterwards too.
    Raises QuantizationError, naming the tensor, for values above `dtype`'s range (fp16: 65,504), CheckpointError for
    too little room on the disk, a checkpoint that is not there, or a folder with something in it unless `overwrite`;
    what was there before is then untouched. ConfigError for examples that do not belong to the model.
    """
    _check_options(base, dtype, max_shard_bytes)
    if getattr(model, "config", None) is None:
        raise ConfigError(f"export needs a transformers model with a config; got a {type(model).__name__}")
    source = hub.model_folder(model)
    with using_adapter(model, active_adapter(model) if name is None else name):
        plan = ExportPlan.of(model, base, dtype, ModelInMemory(), _originals(model, source, base))
        return _write(model, source, Path(folder), plan, max_shard_bytes, overwrite, verify)


def merge_checkpoint(
    path_or_id: str | Path,
    adapter: str | Path,
    folder: str | Path,
    config: QuantConfig | None = None,
    dtype: torch.dtype = torch.float16,
    *,
    base: str = DEQUANTIZED,
    load_dtype: torch.dtype = torch.bfloat16,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    verify: Sequence[TokenizedExample] | None = None,
    any_base: bool = False,
) -> Exported:
    """What `export_merged` writes of a model loaded with `config` and the adapter, bit for bit, without loading it.

    Rows are read, packed and unpacked again as training had them (load_dtype: the dtype that it was loaded in; only
    `base='original'` leaves that out), merged and written, so memory does not grow with the model. Raises what
    `load_quantized`, `load_adapter_` (any_base: as there) and `export_merged` raise; another base than the adapter's is
    told from the files before anything else.
    """
    _check_options(base, dtype, max_shard_bytes)
    set_host_limits()
    source = hub.checkpoint_folder(path_or_id)
    check_output_is_not_input(Path(folder), source, Path(adapter))
    if not any_base:
        check_trained_on_checkpoint(Path(adapter), source)
    model: Any = hub.empty_model(hub.read_config(source), load_dtype)
    architecture.tie(model)
    _check_has_originals(source, base)
    checkpoint = Checkpoint.open(source, model, config)
    weights_to_pack = checkpoint.weights_to_pack(model)
    adapted = load_adapter_(model, adapter, any_base=True)  # which was asked above
    _check_own_base(Path(adapter), adapted, checkpoint, weights_to_pack, load_dtype)
    _check_same_base(Path(adapter), model, checkpoint, weights_to_pack, load_dtype)
    origin = ModelOnDisk(weights_to_pack, checkpoint, load_dtype, lazy_updates_(model, adapter))
    hub.load_generation_config_(model, source)
    plan = ExportPlan.of(model, base, dtype, origin, checkpoint.originals)
    return _write(model, source, Path(folder), plan, max_shard_bytes, overwrite, verify)
