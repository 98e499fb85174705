"""`load_quantized`: from a checkpoint on disk to a frozen packed model, a few rows at a time.

The last step of a weight on its way in. The checkpoint is plain, and its weights are packed while they are read, or
bitsandbytes packed it (saved by transformers or by `save_quantized`), and its packed bytes are kept.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.checkpoints import hub
from qlora_lite.checkpoints.base_identity import BaseIdentity, checkpoint_identity_or_error, set_base_identity_
from qlora_lite.checkpoints.base_on_disk import mapped_checkpoint
from qlora_lite.checkpoints.checkpoint import SHOWN, Checkpoint
from qlora_lite.checkpoints.layouts.mapped_weights import MappedTensor
from qlora_lite.checkpoints.lazy_tensors import READ_BYTES, LazyTensor, read_slices
from qlora_lite.checkpoints.pack_on_load import LazyPackedWeight
from qlora_lite.checkpoints.shares.load_shares import Shares, check_same_in_all
from qlora_lite.checks import check_finite, require
from qlora_lite.compute.devices import on_cpu
from qlora_lite.compute.host_memory import release_freed_pages, set_host_limits
from qlora_lite.errors import CheckpointError, ConfigError, QuantizationError, listing
from qlora_lite.offload.disk_source import attach_disk_source_
from qlora_lite.offload.mapped_file import check_can_map
from qlora_lite.progress.work import BYTES, working
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.formats import either
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.quantization.quantize_model import WeightToPack
from qlora_lite.quantization.selection import left_unpacked
from qlora_lite.sharding.group import Group
from qlora_lite.signals import check_signals
from qlora_lite.surgery import described_by_pattern, leave_out_towers_, tower_names
from qlora_lite.tasks import task_of

MEMORY, DISK = BASES = ("memory", "disk")  # where a base is held


@dataclass(frozen=True)
class LoadReport:
    """What a loaded model is without, in memory or of its checkpoint; `load_quantized` sets it as `load_report`.

    left_unpacked: layers and stacks that stay unpacked although a format was asked for, with the reasons.
    unpacked_bytes: of their weights. passed_over: tensors of the checkpoint that the model has no place for. created:
    parameters of the model's head that the checkpoint lacks, and that start untrained. towers: the parts beside the
    language model. not_loaded: tensors of these, if they were left out.
    """

    left_unpacked: Mapping[str, str] = field(default_factory=dict)
    unpacked_bytes: int = 0
    passed_over: Sequence[str] = ()
    created: Sequence[str] = ()
    towers: Sequence[str] = ()
    not_loaded: Sequence[str] = ()

    def in_words(self) -> list[str]:
        """Returns lines for people to read; none if there is nothing to say."""
        lines = []
        if self.left_unpacked:
            lines.append(f"{len(self.left_unpacked)} layers stay unpacked ({self.unpacked_bytes:,} bytes):")
            lines += [f"  {line}" for line in described_by_pattern(self.left_unpacked, self.towers)]
        if self.passed_over:
            lines.append(f"{len(self.passed_over)} tensors of the checkpoint are not part of the model:")
            lines += [f"  {line}" for line in described_by_pattern(dict.fromkeys(self.passed_over, "passed over"))]
        if self.created:
            lines.append(f"{len(self.created)} tensors are not in the checkpoint and start untrained:")
            lines += [f"  {line}" for line in described_by_pattern(dict.fromkeys(self.created, "untrained"))]
        if self.not_loaded:
            lines.append(f"not loaded ({len(self.not_loaded)} tensors): {', '.join(self.towers)}")
        return lines


def check_base(base: str, device: str = "cpu") -> None:
    """Raises ConfigError for another place of a base than `memory` and `disk`, or one that the system cannot have."""
    require(base in BASES, f"base must be {either(*BASES)}", base)
    if base == DISK:
        check_can_map()
        require(on_cpu(torch.device(device)), "a base on disk is computed with on a CPU: device must be cpu", device)


class CheckpointLike(Protocol):
    """The part of `Checkpoint` that loading uses; planning/ replaces it by a checkpoint of shapes only."""

    @property
    def config(self) -> QuantConfig: ...

    @property
    def tensors(self) -> Mapping[str, object]: ...

    def plain(self, name: str) -> LazyTensor: ...

    def packed_weights(self, name: str, to_pack: WeightToPack, dtype: torch.dtype) -> list[LazyPackedWeight]: ...

    def weights_to_pack(self, model: nn.Module) -> list[WeightToPack]: ...


class TensorLoader:
    """Puts the tensors of a checkpoint into a model: packed where needed, plain into all modules that have them."""

    def __init__(
        self,
        model: nn.Module,
        checkpoint: CheckpointLike,
        dtype: torch.dtype,
        device: torch.device,
        shares: Shares | None = None,
    ) -> None:
        self.model, self.checkpoint, self.dtype, self.device = model, checkpoint, dtype, device
        self._shares = shares
        self.to_pack: dict[Tensor, WeightToPack] = {
            to_pack.weight: to_pack for to_pack in checkpoint.weights_to_pack(model)
        }
        self._names: dict[Tensor, list[str]] = {}
        for name, tensor in model.state_dict(keep_vars=True).items():
            self._names.setdefault(tensor, []).append(name)

    def load_(self, name: str, target: Tensor) -> None:
        """Reads a tensor in place of `target`, the one on meta. Raises QuantizationError for values not finite."""
        to_pack, config = self.to_pack.get(target), self.checkpoint.config
        if to_pack is not None:
            load = self._load_whole if self._shares is None else self._shares.packed
            packed = [load(weight) for weight in self.checkpoint.packed_weights(name, to_pack, self.dtype)]
            for matrix in packed:
                matrix.int8_activations = config.int8_activations and matrix.format == config.format
                matrix.plain_dtype = self.dtype
            if to_pack.stack is None:
                to_pack.fill_(self.model, packed[0], config)
            else:
                to_pack.fill_stack_(self.model, packed, config)
            return
        self.load_plain_(name, target)

    def load_plain_(self, name: str, target: Tensor) -> None:
        """Reads a tensor unpacked in place of `target`, the one on meta, also one that is to be packed."""
        stored, owners = self.checkpoint.plain(name), list[tuple[nn.Module, str]]()
        for name in self._names[target]:
            owner, _, key = name.rpartition(".")
            owners.append((self.model.get_submodule(owner), key))
        if self._shares is not None and self._shares.takes(owners, target, stored):
            return
        loaded = self._plain(stored, target.dtype)
        value = nn.Parameter(loaded, requires_grad=False) if isinstance(target, nn.Parameter) else loaded
        for module, key in owners:
            setattr(module, key, value)

    def _load_whole(self, weight: LazyPackedWeight) -> PackedWeight:
        return weight.load(self.device)

    def _plain(self, stored: LazyTensor, dtype: torch.dtype) -> Tensor:
        if isinstance(stored, MappedTensor):
            return stored.mapped()
        loaded = torch.empty(stored.shape, dtype=dtype, device=self.device)
        for first, rows in read_slices(stored, READ_BYTES):
            part = loaded[first : first + rows.shape[0]] if loaded.dim() else loaded
            part.copy_(rows)
            check_finite(part, stored.name, first)
        return loaded


def load_quantized(
    path_or_id: str | Path,
    config: QuantConfig | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    ignore_unexpected: bool = False,
    task: str | type | None = None,
    labels: int | Sequence[str] | None = None,
    text_only: bool = False,
    base: str = MEMORY,
    shard: bool = False,
) -> Any:
    """Loads a transformers model from a safetensors checkpoint, packed and frozen.

    Packed are linear layers, GPT-2's Conv1D, and the matrices of stacks of experts. Other tensors (norms, embeddings,
    biases) are held in `dtype`, which is then the dtype of the activations. Tensors that have other names in the files,
    or lie there in pieces, are converted while they are read, as transformers' checkpoint conversion does.

    At most a slice of `READ_BYTES` is unpacked at a time, so memory stays close to that of the packed model. A folder
    that bitsandbytes packed keeps its bytes: format, block size and choice of layers are those of the files, and
    `config` sets the rest.

    Layers that cannot be packed stay as they are, and tensors of a vision tower or the like are passed over.
    `ignore_unexpected` passes over all tensors that the model has no place for: extra heads, buffers of older releases.
    `model.load_report` (LoadReport) lists both.
    `text_only` leaves out the vision tower and the projector of a vision-language model: it takes text alone, and its
    exports take their tensors from the checkpoint.

    task: a name in `tasks.TASKS` (`causal-lm`, `sequence-classification`, ...), or a class of transformers; None for
    the class that the checkpoint's config names. labels: of a classifier, their names or their number; None for those
    in the config. A head of labels that the checkpoint lacks, or that it has for another number of labels, starts
    untrained, with the same values in each call; it stays unpacked, and `add_lora_` trains it whole.

    base: where the packed weights and large plain tensors are held: in `memory`, or on `disk`, where they are mapped
    and read block by block each time that the model runs (docs/larger_than_memory.md). A checkpoint that is not packed
    is then packed once into the cache folder. The results are the same, bit for bit.

    shard: hold the packed base in equal shares, one in each of the processes that torchrun or `accelerate launch`
    started; all of them must call this with the same arguments. Each reads the bytes of its own share, onto its own
    device. Blocks are gathered when they are computed, so all processes must call the model equally often.

    Raises CheckpointError for missing, unexpected or mis-shaped tensors, all listed, before anything is read;
    ConfigError if `config` asks for another format than a packed folder has, for a task that transformers has no class
    for, for labels of another task, if `text_only` has nothing to leave out, and for a base on disk where the system or
    the device cannot have one; QuantizationError for values that are
    NaN, infinite, or too large for the format, listing every tensor that has some. With `shard`, ConfigError in a
    process that no launcher started and for processes with different models, and LostProcess if one of them ends.
    """
    check_base(base, str(device))
    require(not (shard and base == DISK), "a base in shares is held in memory", base)
    group = Group.join() if shard else None
    place = torch.device(device) if group is None else group.device
    with nullcontext() if group is None else group.telling():
        opened = OpenedCheckpoint.of(path_or_id, config, dtype, place, ignore_unexpected, task, labels, text_only)
        if base == DISK:
            _load_mapped_(opened, dtype)
            return opened.finished()
        if group is not None:
            check_same_in_all(group, opened.model, opened.checkpoint.config, opened.identity, dtype)
        load_tensors_(opened.model, opened.checkpoint, dtype, place, group)
        return opened.finished()


def _load_mapped_(opened: OpenedCheckpoint, dtype: torch.dtype) -> None:
    """Fills the model with tensors that stay on disk, and reads them block by block whenever the model runs."""
    if isinstance(opened.identity, CheckpointError):
        raise opened.identity
    mapped = mapped_checkpoint(opened.model, opened.checkpoint, opened.identity, dtype)
    load_tensors_(opened.model, mapped, dtype, torch.device("cpu"))
    attach_disk_source_(opened.model).release()  # from here on it holds the files


@dataclass(frozen=True)
class OpenedCheckpoint:
    """An empty model, and the checkpoint that it is filled from: what comes before and after the tensors."""

    folder: Path
    model: Any
    checkpoint: Checkpoint
    report: LoadReport
    identity: BaseIdentity | CheckpointError

    @classmethod
    def of(
        cls,
        path_or_id: str | Path,
        config: QuantConfig | None,
        dtype: torch.dtype,
        device: torch.device | str,
        ignore_unexpected: bool = False,
        task: str | type | None = None,
        labels: int | Sequence[str] | None = None,
        text_only: bool = False,
    ) -> OpenedCheckpoint:
        """Reads config and headers; arguments and errors are those of `load_quantized`."""
        set_host_limits()
        folder = hub.checkpoint_folder(path_or_id)
        model_config = hub.read_config(folder)
        if labels is not None:
            hub.set_labels_(model_config, labels)
        model: Any = hub.empty_model(model_config, dtype, task)
        if labels is not None and not task_of(model).has_labels:
            name = task_of(model).name
            raise ConfigError(f"labels were given for a {type(model).__name__}, whose task {name} has none")
        architecture.tie(model)
        towers = leave_out_towers_(model) if text_only else tower_names(model)
        checkpoint = Checkpoint.open(folder, model, config, ignore_unexpected=ignore_unexpected)
        report = _report(model, checkpoint, towers)
        identity = checkpoint_identity_or_error(folder, model_config)
        architecture.initialize_(model, checkpoint.created, torch.device(device))
        return cls(folder, model, checkpoint, report, identity)

    def finished(self) -> Any:
        """Returns the model, once its tensors are loaded, with its identity, report and generation config."""
        if isinstance(self.identity, CheckpointError):
            raise self.identity
        set_base_identity_(self.model, self.identity)
        self.model.load_report = self.report
        hub.load_generation_config_(self.model, self.folder)
        self.model.config._name_or_path = str(self.folder.absolute())
        release_freed_pages()
        return self.model


def _report(model: nn.Module, checkpoint: Checkpoint, towers: Sequence[str]) -> LoadReport:
    left, tensors = left_unpacked(model, checkpoint.config, checkpoint.packed_layers), model.state_dict(keep_vars=True)
    weights = {id(weight): weight for name in left for weight in (tensors.get(f"{name}.weight", tensors.get(name)),)}
    sizes = [weight.nbytes for weight in weights.values() if weight is not None]
    return LoadReport(left, sum(sizes), checkpoint.passed_over, checkpoint.created, towers, checkpoint.not_loaded)


def load_tensors_(
    model: nn.Module,
    checkpoint: CheckpointLike,
    dtype: torch.dtype,
    device: torch.device,
    group: Group | None = None,
) -> None:
    """Fills a model on meta with the tensors of a checkpoint, packed where they are to be, and freezes the model.

    group: the processes that hold the base in shares, None if this one holds all of it.
    """
    targets = model.state_dict(keep_vars=True)
    shares = None if group is None else Shares(model, group)
    loader = TensorLoader(model, checkpoint, dtype, device, shares)
    bad: list[str] = []
    with working("loading", sum(targets[name].nbytes for name in checkpoint.tensors), BYTES) as work:
        for name in checkpoint.tensors:
            check_signals()
            target = targets.pop(name)  # not kept, so that a replaced tensor can be freed
            size = target.nbytes
            try:
                loader.load_(name, target)
            except QuantizationError as error:
                bad.append(str(error))
            work.advance(size)
    if shares is not None:
        bad = list(dict.fromkeys([*bad, *shares.fill_(model)]))
    if bad:
        raise QuantizationError(listing(bad, SHOWN, "; "))
    architecture.fill_computed_buffers_(model, device)
    freeze_loaded_(model)


def freeze_loaded_(model: nn.Module) -> None:
    """Freezes a model that was filled from a checkpoint. Raises CheckpointError if tensors of it got no values."""
    if lost := architecture.tensors_on_meta(model):
        raise CheckpointError(
            f"{len(lost)} tensors of this {type(model).__name__} got no values: {listing(lost, SHOWN)}"
        )
    model.requires_grad_(False)
