"""Checkpoints out: merged into full precision or packed, written some rows at a time, and verified.

In reading order:

weight_rows      a weight as rows in fp32, from memory, packed codes or disk
plain_weights    a model's weights under the names of a plain checkpoint
plan             every tensor of an export, and where its rows come from
merged           export_merged and merge_checkpoint
report           what an export did to each weight, in numbers
lazy_model   a model that reads each weight when it is called
verify           logits of an export beside those of the adapter model
quantized        save_quantized
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.export.merged import export_merged as export_merged
    from qlora_lite.export.merged import merge_checkpoint as merge_checkpoint
    from qlora_lite.export.quantized import save_quantized as save_quantized
    from qlora_lite.export.report import MergeReport as MergeReport

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "merged": "export_merged merge_checkpoint",
        "quantized": "save_quantized",
        "report": "MergeReport",
    },
)
