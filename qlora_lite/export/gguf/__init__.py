"""GGUF: a trained model, or an adapter alone, as a file for llama.cpp and ollama.

In reading order:

library        the gguf package: names of tensors, a writer of slices, the file read back
rope           rotary positions: settings, and tensors of factors
families       the model families, and what llama.cpp computes of each
tensors        the tensors of a file from those of a plain checkpoint
sentencepiece  SentencePiece's BPE as llama.cpp has it
tokenizer      the tokenizer as settings
modelfile      the Modelfile of ollama
read_back      a file's tensors as a model of transformers has them
merge          export_gguf and merge_checkpoint_to_gguf
adapter        adapter_to_gguf
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qlora_lite.lazy import lazy_names

if TYPE_CHECKING:
    from qlora_lite.export.gguf.adapter import GgufAdapter as GgufAdapter
    from qlora_lite.export.gguf.adapter import adapter_to_gguf as adapter_to_gguf
    from qlora_lite.export.gguf.merge import GgufExport as GgufExport
    from qlora_lite.export.gguf.merge import export_gguf as export_gguf
    from qlora_lite.export.gguf.merge import merge_checkpoint_to_gguf as merge_checkpoint_to_gguf

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "merge": "export_gguf merge_checkpoint_to_gguf GgufExport",
        "adapter": "adapter_to_gguf GgufAdapter",
    },
)
