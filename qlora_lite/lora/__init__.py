"""Adapters: the layer y = W0 x + scaling B A x, the layers that get one, their initialization, and merging in memory.

In reading order:

config             LoraConfig
kinds              how linear layers, embeddings, stacks of experts and routers apply A and B
convolution        how convolutions apply them
variants           what each variant of LoRA trains, computes and merges, and its names in peft's files
layer              LoraLayer, LinearWithLoRA, Embedding
auxiliary_layers   modules with trained copies of their parameters, or with trained token rows
auxiliary          modules_to_save, bias and trainable_token_indices of a model
experts            turns stacks of experts into modules that an adapter can be put around
targets            TargetedLayer, select_targets: the layers that get an adapter, with kind, rank and alpha
init               how A and B start: normal, kaiming, gaussian, orthogonal, PiSSA, LoftQ
adapters           add_lora_, remove_lora_, lora_layers, adapters_disabled
multi_adapter      several adapters on one base, by name; merge_lora_ and unmerge_lora_

peft/ saves and loads adapters as files.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.lora.adapters import adapter_parameters as adapter_parameters
    from qlora_lite.lora.adapters import adapters_disabled as adapters_disabled
    from qlora_lite.lora.adapters import add_lora_ as add_lora_
    from qlora_lite.lora.adapters import lora_layers as lora_layers
    from qlora_lite.lora.adapters import remove_lora_ as remove_lora_
    from qlora_lite.lora.config import LoraConfig as LoraConfig
    from qlora_lite.lora.layer import Embedding as Embedding
    from qlora_lite.lora.layer import LinearWithLoRA as LinearWithLoRA
    from qlora_lite.lora.layer import LoraLayer as LoraLayer
    from qlora_lite.lora.multi_adapter import active_adapter as active_adapter
    from qlora_lite.lora.multi_adapter import adapter_names as adapter_names
    from qlora_lite.lora.multi_adapter import add_adapter_ as add_adapter_
    from qlora_lite.lora.multi_adapter import combine_adapters_ as combine_adapters_
    from qlora_lite.lora.multi_adapter import delete_adapter_ as delete_adapter_
    from qlora_lite.lora.multi_adapter import merge_lora_ as merge_lora_
    from qlora_lite.lora.multi_adapter import unmerge_lora_ as unmerge_lora_
    from qlora_lite.lora.multi_adapter import use_adapter_ as use_adapter_
    from qlora_lite.lora.multi_adapter import using_adapter as using_adapter
    from qlora_lite.lora.peft.save_load import load_adapter_ as load_adapter_
    from qlora_lite.lora.peft.save_load import save_adapter as save_adapter

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "config": "LoraConfig",
        "layer": "LoraLayer LinearWithLoRA Embedding",
        "adapters": "add_lora_ remove_lora_ lora_layers adapter_parameters adapters_disabled",
        "multi_adapter": "add_adapter_ use_adapter_ using_adapter combine_adapters_ delete_adapter_ active_adapter "
        "adapter_names merge_lora_ unmerge_lora_",
        "peft.save_load": "save_adapter load_adapter_",
    },
)
