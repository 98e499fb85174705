"""qlora_lite: fine-tune a quantized model in the least memory that it can be done in, and prove what you export.

The public door. Names are imported when they are first used, so that `import qlora_lite` costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

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
    from qlora_lite.lora.merge import merge_lora_ as merge_lora_
    from qlora_lite.lora.merge import unmerge_lora_ as unmerge_lora_
    from qlora_lite.lora.peft.save_load import load_adapter_ as load_adapter_
    from qlora_lite.lora.peft.save_load import save_adapter as save_adapter
    from qlora_lite.memory.measure import MemoryProfiler as MemoryProfiler
    from qlora_lite.planning.rehearsal import rehearse as rehearse
    from qlora_lite.quantization.config import QuantConfig as QuantConfig
    from qlora_lite.quantization.quantize_model import quantize_base_ as quantize_base_
    from qlora_lite.training.config import TrainConfig as TrainConfig
    from qlora_lite.training.loop import train as train

__version__ = "0.1.0"

_HOME = {
    "Embedding": "lora",
    "LinearWithLoRA": "lora",
    "LoraConfig": "config",
    "LoraLayer": "lora",
    "MemoryProfiler": "memory.measure",
    "QLoRAError": "errors",
    "QuantConfig": "config",
    "TrainConfig": "config",
    "add_lora_": "adapters",
    "export_merged": "export",
    "linear_cross_entropy": "loss",
    "load_adapter_": "adapter_files",
    "load_quantized": "load",
    "merge_lora_": "merge",
    "quantize_base_": "quantize_base",
    "rehearse": "memory.rehearse",
    "save_adapter": "adapter_files",
    "train": "training",
    "unmerge_lora_": "merge",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*globals(), *__all__]
