"""Saves, loads and describes adapters in peft's two files, adapter_model.safetensors and adapter_config.json.

In reading order:

keys            the names of tensors in adapter_model.safetensors
options         the options in adapter_config.json: read, ignored or refused
config_json     writes adapter_config.json for the adapted layers of a model
targets         the layers that target_modules and target_parameters select, as peft reads them
experts         the keys and the layout of stacks of experts
auxiliary       modules_to_save, biases and token rows
stored_adapter  an adapter read from the files and matched to a model
lost_layers     layers whose adapters peft does not load, by the type of the base
card            the model card of an adapter
save_load       save_adapter and load_adapter_
describe        describes an adapter on disk, without a model
compatibility   whether peft, vLLM and llama.cpp accept an adapter
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.lora.peft.compatibility import Compatibility as Compatibility
    from qlora_lite.lora.peft.compatibility import check_compatibility as check_compatibility
    from qlora_lite.lora.peft.describe import AdapterDescription as AdapterDescription
    from qlora_lite.lora.peft.describe import describe_adapter as describe_adapter
    from qlora_lite.lora.peft.save_load import load_adapter_ as load_adapter_
    from qlora_lite.lora.peft.save_load import save_adapter as save_adapter

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "save_load": "save_adapter load_adapter_",
        "describe": "describe_adapter AdapterDescription",
        "compatibility": "check_compatibility Compatibility",
    },
)
