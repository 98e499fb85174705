"""Checkpoint folders: reading, converting, packing and loading their tensors, writing them, and identifying a base.

A weight on its way in goes through safetensors_read, lazy_tensors, conversion, pack_on_load or layouts/,
checkpoint and load; on its way out through safetensors_write and atomic_folder. In reading order:

files                 regular files and JSON, read with limits and written as a whole
atomic_folder         a folder that is written completely or not at all
safetensors_write     safetensors files, written some rows at a time
safetensors_read      tensors in safetensors files, read some rows at a time
lazy_tensors          stacked, concatenated, narrowed or transposed views of tensors in files
hub                   config, empty model and tokenizer from transformers
conversion            a model's tensors, built from a checkpoint's as transformers converts them
pack_on_load          a plain weight, packed while it is read
checkpoint            the tensors of a folder, checked against a model
base_identity         the checkpoint that an adapter was trained on
base_on_disk          a base that is mapped where it lies, or packed into a file for that
load                  load_quantized

The room layouts/ reads weights that are packed in the files, shares/ a part of a checkpoint; repository/ is about
repositories of the hub.
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
