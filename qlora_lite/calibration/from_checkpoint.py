"""`calibrate`: packs a checkpoint with text, and writes it as a folder that transformers and `load_quantized` load."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qlora_lite import architecture
from qlora_lite.calibration.block_chain import BlockChain
from qlora_lite.calibration.block_packing import BlockPacker
from qlora_lite.calibration.held_out import Comparison
from qlora_lite.calibration.kept_blocks import KeptBlocks
from qlora_lite.calibration.layer_inputs import token_count
from qlora_lite.calibration.report import CALIBRATED, METHOD, PLAIN, ROUNDED, VERSION, CalibrationReport
from qlora_lite.checkpoints.atomic_folder import check_replaceable
from qlora_lite.checkpoints.base_identity import model_identity, packed_weights_hash, set_base_identity_
from qlora_lite.checkpoints.load import OpenedCheckpoint, TensorLoader, freeze_loaded_
from qlora_lite.checkpoints.safetensors_write import DEFAULT_SHARD_BYTES
from qlora_lite.checks import require
from qlora_lite.errors import CheckpointError, ConfigError, Stopped
from qlora_lite.export.quantized import save_quantized
from qlora_lite.positions import most_positions
from qlora_lite.progress.work import working
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.formats import either, formats_where
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.surgery import repeated_blocks
from qlora_lite.tasks import CAUSAL_LM, IMAGE_TEXT_TO_TEXT, task_of

Batch = Mapping[str, Tensor]


def check_calibratable(config: QuantConfig) -> None:
    """Raises ConfigError for a format that calibration does not choose codes of."""
    names = formats_where(lambda row: row.layout.has_blocks)
    what = f"calibration chooses codes of {either(*names)} (int8 rows lose almost nothing by rounding)"
    require(config.format in names, what, config.format)


def text_hash(batches: Iterable[Batch]) -> str:
    """Returns the SHA-256, in hex, of the tensors of batches, their names and shapes."""
    digest = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            digest.update(f"{name} {tuple(batch[name].shape)}\n".encode())
            digest.update(batch[name].to("cpu", torch.int64).contiguous().numpy().tobytes())
    return digest.hexdigest()


def _check_text(batches: Sequence[Batch], held_out: Sequence[Batch], model: Any) -> None:
    """Raises ConfigError for batches that the model cannot be run on."""
    require(len(batches) > 0, "calibration needs at least one batch", len(batches))
    vocabulary, limit = architecture.vocabulary_size(model), most_positions(model)
    for batch in (*batches, *held_out):
        ids = batch.get("input_ids")
        good = isinstance(ids, Tensor) and ids.dim() == 2 and ids.shape[1] >= 2 and not ids.is_floating_point()
        got = None if ids is None else tuple(ids.shape)
        require(good, "each batch needs input_ids of shape (rows, tokens), of at least 2 tokens", got)
        assert ids is not None
        if vocabulary is not None and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise ConfigError(f"a batch has token {int(ids.max())}, the model has {vocabulary}; use its tokenizer")
        if limit is not None and ids.shape[1] > limit:
            raise ConfigError(f"a batch has rows of {ids.shape[1]} tokens, the model takes {limit}; cut them")


def calibrated_model(
    path_or_id: str | Path,
    batches: Iterable[Batch],
    config: QuantConfig | None = None,
    *,
    held_out: Iterable[Batch] = (),
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    ignore_unexpected: bool = False,
    resume_folder: Path | None = None,
) -> Any:
    """Loads a causal language model packed and frozen, as `load_quantized`, with codes chosen by text.

    Each weight is packed for its inputs on the text (error_feedback.py), in the order of the forward pass. One block
    of the model is in full precision at a time. Layers that this cannot be done for are packed by rounding:
    `model.calibration` (CalibrationReport) names them, with the errors of all others.

    batches: of text, `input_ids` `(rows, tokens)`, with `attention_mask` if rows are padded. Their hidden states are
    kept twice. held_out: others, on which the 16-bit, the rounded and the calibrated model are compared.
    resume_folder: blocks are kept there as soon as they are packed, and read from there if the same calibration was
    stopped before. The caller removes it.

    Raises ConfigError for int8 or unpacked weights, for text that the model cannot be run on, and for a model that does
    not pass one hidden state from block to block; CheckpointError for a checkpoint that is packed already; else as
    `load_quantized`.
    """
    began, config = time.monotonic(), config or QuantConfig()
    check_calibratable(config)
    calibration, others = [*batches], [*held_out]
    opened = OpenedCheckpoint.of(path_or_id, config, dtype, device, ignore_unexpected)
    model = opened.model
    _check_can_be_calibrated(opened)
    _check_text(calibration, others, model)
    place = torch.device(device)
    loader = TensorLoader(model, opened.checkpoint, dtype, place)
    kept = None if resume_folder is None else KeptBlocks(resume_folder, _key(opened, calibration, dtype))
    if kept is not None:
        kept.open()
    packer = BlockPacker(opened, loader, place, model.state_dict(keep_vars=True), kept)
    try:
        comparison = _pack_(packer, *([_moved(batch, place) for batch in text] for text in (calibration, others)))
    except Stopped as stop:
        if kept is None or not kept.folder.is_dir():
            raise
        raise Stopped(stop.number, f"{stop}; the same calibration goes on from {kept.folder}") from None
    freeze_loaded_(model)
    opened.finished()
    digest = packed_weights_hash(sorted(_packed_weights(model)))
    if (identity := model_identity(model)) is not None:
        set_base_identity_(model, replace(identity, calibration=digest))
    tokens, others_tokens = (sum(token_count(batch) for batch in text) for text in (calibration, others))
    model.calibration = CalibrationReport(
        format=config.format,
        data_sha256=text_hash(calibration),
        tokens=tokens,
        held_out_tokens=others_tokens,
        seconds=time.monotonic() - began,
        layers=packer.errors,
        rounded=packer.left,
        held_out=comparison,
    )
    return model


def _check_can_be_calibrated(opened: OpenedCheckpoint) -> None:
    task = task_of(opened.model)
    if task not in (CAUSAL_LM, IMAGE_TEXT_TO_TEXT):
        name = type(opened.model).__name__
        raise ConfigError(f"a {name} cannot be calibrated: its task is {task.name}, and only language models are")
    if opened.checkpoint.packed_layers:
        raise CheckpointError(
            f"{opened.folder} is packed already, and calibration needs the weights in full precision; name the "
            f"checkpoint that it was packed from"
        )


def _key(opened: OpenedCheckpoint, calibration: Sequence[Batch], dtype: torch.dtype) -> dict[str, object]:
    """Returns what the packed blocks of a calibration depend on."""
    files = [path for path in sorted(opened.folder.glob("*.safetensors")) if path.is_file()]
    config = opened.checkpoint.config
    return {
        "method": METHOD,
        "version": VERSION,
        "torch": torch.__version__,
        "text": text_hash(calibration),
        "checkpoint": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files],
        "format": [config.format, config.blocksize, config.double_quant, str(config.compute_dtype), str(dtype)],
        "other layers": [config.embedding_format, config.skip_modules and list(config.skip_modules)],
    }


def _packed_weights(model: nn.Module) -> Iterator[tuple[str, PackedWeight]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, PackedWeight))


def _moved(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """Returns what the model takes of a batch, on a device."""
    return {name: value.to(device) for name, value in architecture.model_inputs(batch).items()}


@torch.no_grad()
def _pack_(packer: BlockPacker, calibration: Sequence[Batch], held_out: Sequence[Batch]) -> Comparison | None:
    """Fills and packs the model. Returns the comparison on held-out text, None without any."""
    model = packer.opened.model
    packer.load_around_(repeated_blocks(model))
    chain = BlockChain.of(model, calibration[0])
    unused = [block for block in repeated_blocks(model) if block not in set(chain.blocks)]
    for block in unused:  # of a vision tower, which text does not pass through
        packer.load_unused_(block)
    texts = [packer.text(chain, batch, False) for batch in calibration]
    texts += [packer.text(chain, batch, True) for batch in held_out]
    with working("calibrating", packer.layer_count(chain.blocks), "layers") as work:
        for number, block in enumerate(chain.blocks):
            packer.pack_block_(block, number, texts, work)
    if not held_out:
        return None
    comparison = Comparison()
    for text in texts:
        if text.rounded is not None:
            states = {PLAIN: text.plain, ROUNDED: text.rounded, CALIBRATED: text.packed}
            hidden = {name: chain.head_inputs(text.batch, state) for name, state in states.items()}
            comparison.add(model, text.batch, PLAIN, hidden)
    return comparison


def calibrate(
    path_or_id: str | Path,
    folder: str | Path,
    batches: Iterable[Batch],
    config: QuantConfig | None = None,
    *,
    held_out: Iterable[Batch] = (),
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
    ignore_unexpected: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
) -> CalibrationReport:
    """Packs a checkpoint with text (`calibrated_model`), and writes it by `save_quantized`. Returns its report.

    The folder is one that transformers and bitsandbytes load as any other, and `load_quantized` too; beside the tensors
    lies `calibration.json`, the report. Until it is written, packed blocks are kept in a folder next to it
    (`unfinished_folder`), so that the same call goes on where it was stopped.
    """
    check_replaceable(Path(folder), overwrite)
    unfinished = unfinished_folder(Path(folder))
    model = calibrated_model(
        path_or_id,
        batches,
        config,
        held_out=held_out,
        dtype=dtype,
        device=device,
        ignore_unexpected=ignore_unexpected,
        resume_folder=unfinished,
    )
    save_quantized(model, folder, max_shard_bytes=max_shard_bytes, overwrite=overwrite)
    shutil.rmtree(unfinished, ignore_errors=True)
    report: CalibrationReport = model.calibration
    return report


def unfinished_folder(folder: Path) -> Path:
    """Returns where the packed blocks of a calibration are kept until `folder` is written: `.name.calibrating`."""
    target = Path(os.path.realpath(folder))
    return target.with_name(f".{target.name}.calibrating")
