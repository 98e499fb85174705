"""An adapter in the two files of peft, and which other programs accept it.

In reading order:

keys            names of tensors, and the options of peft's LoraConfig
config_json     adapter_config.json, and which layers it means
auxiliary       modules_to_save, biases and token rows in the files
experts         stacks of experts in the files
save_load       save_adapter and load_adapter_
describe        what an adapter on disk is, without a model
compatibility   whether vLLM and llama.cpp accept it
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.lora.peft.compatibility import Verdict as Verdict
    from qlora_lite.lora.peft.compatibility import verdicts as verdicts
    from qlora_lite.lora.peft.describe import AdapterFacts as AdapterFacts
    from qlora_lite.lora.peft.describe import adapter_facts as adapter_facts
    from qlora_lite.lora.peft.save_load import load_adapter_ as load_adapter_
    from qlora_lite.lora.peft.save_load import save_adapter as save_adapter

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "save_load": "save_adapter load_adapter_",
        "describe": "adapter_facts AdapterFacts",
        "compatibility": "verdicts Verdict",
    },
)
