"""`qlora-lite quantize`: writes a checkpoint with packed weights."""

from __future__ import annotations

from qlora_lite.cli.options import (
    Blocksize,
    DoubleQuant,
    EmbeddingFormat,
    IgnoreUnexpected,
    Json,
    MaxShardSize,
    Model,
    Output,
    Overwrite,
    PackedFormat,
    SkipModules,
    check_output,
    finish,
    shard_bytes,
    skipped,
)
from qlora_lite.quantization.formats import DEFAULT_FORMAT, UNPACKED


def quantize(
    model: Model,
    output: Output,
    format: PackedFormat = DEFAULT_FORMAT,
    blocksize: Blocksize = 64,
    double_quant: DoubleQuant = True,
    embedding_format: EmbeddingFormat = UNPACKED,
    skip_modules: SkipModules = None,
    max_shard_size: MaxShardSize = "5GB",
    ignore_unexpected: IgnoreUnexpected = False,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a packed checkpoint that transformers loads as pre-quantized, and the other commands as --model."""
    from qlora_lite.checkpoints.load import load_quantized
    from qlora_lite.export.quantized import check_formats, save_quantized
    from qlora_lite.quantization.config import QuantConfig
    from qlora_lite.signals import deferred_signals

    quant = QuantConfig(
        format, blocksize, double_quant, embedding_format=embedding_format, skip_modules=skipped(skip_modules)
    )
    check_formats(quant)
    shard = shard_bytes(max_shard_size)
    check_output(output, overwrite, model)
    with deferred_signals():
        loaded = load_quantized(model, quant, ignore_unexpected=ignore_unexpected)
        files = save_quantized(loaded, output, max_shard_bytes=shard, overwrite=overwrite)
    for line in loaded.load_report.in_words():
        print(line)
    size = sum((output / file).stat().st_size for file in files)
    finish({"format": format, "bytes": size, "files": files, "output": str(output)}, json)
