"""Readers: whether other programs read a merged checkpoint as the model that it is.

In reading order:

checkpoint_folder  a checkpoint as its files describe it, without tensor values
rules              what vLLM, llama.cpp and transformers 4 would misread
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.export.readers.checkpoint_folder import CheckpointDescription as CheckpointDescription
    from qlora_lite.export.readers.checkpoint_folder import describe_checkpoint as describe_checkpoint
    from qlora_lite.export.readers.rules import check_readers as check_readers

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {"checkpoint_folder": "describe_checkpoint CheckpointDescription", "rules": "check_readers"},
)
