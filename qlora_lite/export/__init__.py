"""Export: a trained model as a merged or packed checkpoint, written some rows at a time, and verified.

A weight on its way out goes through weight_rows, plain_weights, model_weights, merged_tensor, checkpoint_names, plan
and merged, then through checkpoints/safetensors_write and checkpoints/atomic_folder. In reading order:

weight_rows       rows of a weight in fp32, from a dense, packed or stored tensor
plain_weights     a model's weights by the model's names, without packing and adapters
lazy_model        a model that reads each weight when it is called
verify            logits of an export compared with those of the adapter model
report            figures of an export: errors of packing and rounding, size of the update
model_weights     the weights of a model in memory, or of a checkpoint and an adapter on disk
merged_tensor     merged weights as lazy tensors
checkpoint_names  the tensors of a checkpoint as views of those of the model
plan              every tensor of an export, and how its rows are computed
companion_files   config, tokenizer, processors, chat templates and licence
merged            export_merged and merge_checkpoint
quantized         save_quantized

The room publishing/ uploads an adapter or an export to the hub.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.export.merged import export_merged as export_merged
    from qlora_lite.export.merged import merge_checkpoint as merge_checkpoint
    from qlora_lite.export.publishing.push import push_to_hub as push_to_hub
    from qlora_lite.export.quantized import save_quantized as save_quantized
    from qlora_lite.export.report import MergeReport as MergeReport

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "merged": "export_merged merge_checkpoint",
        "quantized": "save_quantized",
        "report": "MergeReport",
        "publishing.push": "push_to_hub",
    },
)
