"""Describes a merged or packed checkpoint from its config and the headers of its files: no tensor values are read."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qlora_lite.checkpoints import hub
from qlora_lite.checkpoints.conversion import tensors_as_saved
from qlora_lite.checkpoints.files import read_json
from qlora_lite.checkpoints.safetensors_read import StoredTensor, TensorFiles

TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class CheckpointDescription:
    """A checkpoint as its files describe it.

    file: config.json. config: what transformers makes of it. tensors: by their names in the files. own_names: those of
    them that only transformers 5 gives a tensor, where the family's checkpoints have another name or several pieces.
    packed_by: the method of a packed checkpoint. tokenizer_class: as tokenizer_config.json names it.
    """

    folder: Path
    file: dict[str, Any]
    config: Any
    tensors: Mapping[str, StoredTensor]
    own_names: tuple[str, ...]
    packed_by: str | None
    tokenizer_class: str | None

    def parts(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yields the config, and the configs inside it, each with the prefix that its keys have in messages."""
        yield "", self.file
        yield from ((f"{key}.", part) for key, part in self.file.items() if key.endswith("_config") and _is_model(part))

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of the tensors."""
        return tuple(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors.values()}))

    @property
    def bytes(self) -> int:
        """The bytes of the tensors."""
        return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in self.tensors.values())

    def to_json(self) -> dict[str, object]:
        """Returns plain data for `json.dumps`."""
        return {
            "checkpoint": str(self.folder),
            "model_type": self.file.get("model_type"),
            "architectures": self.file.get("architectures"),
            "tensors": len(self.tensors),
            "bytes": self.bytes,
            "dtypes": list(self.dtypes),
            "packed_by": self.packed_by,
        }


def _is_model(part: object) -> bool:
    return isinstance(part, dict) and "model_type" in part


def describe_checkpoint(folder: str | Path) -> CheckpointDescription:
    """Describes the checkpoint in a folder.

    Raises CheckpointError for files that are missing or damaged, and for a config that transformers does not know.
    """
    folder = hub.checkpoint_folder(folder)
    packing = hub.quantization_config(folder)
    stored = TensorFiles(folder).stored
    config = hub.read_config(folder)
    tokenizer = read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
    named = tokenizer.get("tokenizer_class")
    return CheckpointDescription(
        folder,
        read_json(folder / hub.CONFIG_FILE),
        config,
        stored,
        tuple(_own_names(config, stored)) if packing is None else (),
        None if packing is None else str(packing.get("quant_method", "an unknown method")),
        named if isinstance(named, str) else None,
    )


def _own_names(config: Any, stored: Mapping[str, StoredTensor]) -> list[str]:
    """Returns the names of tensors that the model has and the checkpoints of its family have not."""
    model = hub.empty_model(config, torch.bfloat16)
    saved = tensors_as_saved(model)
    return sorted(name for name in model.state_dict() if name in stored and name not in saved)
