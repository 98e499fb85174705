"""qlora_lite: fine-tune a quantized model in the least memory it can be done in, and prove what you export.

The public names. Each is imported when it is first used, so that `import qlora_lite` costs nothing. Rooms, from the
ground up: compute, quantization, checkpoints, lora, data, memory, export, training, planning, integrations, cli.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.checkpoints.load import load_quantized as load_quantized
    from qlora_lite.compute.cross_entropy import linear_cross_entropy as linear_cross_entropy
    from qlora_lite.errors import QLoRAError as QLoRAError
    from qlora_lite.export.merged import export_merged as export_merged
    from qlora_lite.lora.adapters import add_lora_ as add_lora_
    from qlora_lite.lora.config import LoraConfig as LoraConfig
    from qlora_lite.lora.layer import Embedding as Embedding
    from qlora_lite.lora.layer import LinearWithLoRA as LinearWithLoRA
    from qlora_lite.lora.layer import LoraLayer as LoraLayer
    from qlora_lite.lora.multi_adapter import merge_lora_ as merge_lora_
    from qlora_lite.lora.multi_adapter import unmerge_lora_ as unmerge_lora_
    from qlora_lite.lora.peft.save_load import load_adapter_ as load_adapter_
    from qlora_lite.lora.peft.save_load import save_adapter as save_adapter
    from qlora_lite.memory.profiler import MemoryProfiler as MemoryProfiler
    from qlora_lite.planning.rehearsal import rehearse as rehearse
    from qlora_lite.quantization.config import QuantConfig as QuantConfig
    from qlora_lite.quantization.quantize_model import quantize_base_ as quantize_base_
    from qlora_lite.training.config import TrainConfig as TrainConfig
    from qlora_lite.training.loop import train as train

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "lora.config": "LoraConfig",
        "quantization.config": "QuantConfig",
        "training.config": "TrainConfig",
        "lora.layer": "LoraLayer LinearWithLoRA Embedding",
        "checkpoints.load": "load_quantized",
        "quantization.quantize_model": "quantize_base_",
        "lora.adapters": "add_lora_",
        "training.loop": "train",
        "lora.multi_adapter": "merge_lora_ unmerge_lora_",
        "export.merged": "export_merged",
        "lora.peft.save_load": "save_adapter load_adapter_",
        "compute.cross_entropy": "linear_cross_entropy",
        "memory.profiler": "MemoryProfiler",
        "planning.rehearsal": "rehearse",
        "errors": "QLoRAError",
    },
)
