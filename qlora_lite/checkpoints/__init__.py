"""Checkpoint folders: reading, writing, converting and loading them, and telling which base they are.

In reading order:

files                 regular files and JSON, read with care and written whole
atomic_folder         a folder that is written whole or not at all
safetensors_write     safetensors files, some rows at a time
safetensors_read      the same, checked and read some rows at a time
lazy_tensors          stacked, joined, cut or transposed views of tensors in files
hub                   what is asked of transformers: config, empty model, tokenizer
conversion            tensors under the names of a model, as transformers converts them
bitsandbytes_layout   packed weights under the names that bitsandbytes gives them
pack_on_load           weights read for packing, a slice at a time
load                  load_quantized
base_identity         which checkpoint an adapter was trained on
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.checkpoints.atomic_folder import new_folder as new_folder
    from qlora_lite.checkpoints.atomic_folder import remove_abandoned_folders as remove_abandoned_folders
    from qlora_lite.checkpoints.hub import load_tokenizer as load_tokenizer
    from qlora_lite.checkpoints.hub import read_config as read_config
    from qlora_lite.checkpoints.load import load_quantized as load_quantized
    from qlora_lite.checkpoints.safetensors_read import TensorFiles as TensorFiles
    from qlora_lite.checkpoints.safetensors_read import read_safetensors as read_safetensors
    from qlora_lite.checkpoints.safetensors_write import planned as planned
    from qlora_lite.checkpoints.safetensors_write import write_safetensors as write_safetensors
    from qlora_lite.checkpoints.safetensors_write import write_sharded as write_sharded

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "load": "load_quantized",
        "hub": "load_tokenizer read_config",
        "atomic_folder": "new_folder remove_abandoned_folders",
        "safetensors_write": "write_safetensors write_sharded planned",
        "safetensors_read": "TensorFiles read_safetensors",
    },
)
