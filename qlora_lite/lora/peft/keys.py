"""Tensor names in adapter_model.safetensors of any release of peft, mapped to the keys that today's peft writes.

`base_model.model.<layer>.lora_A.weight` and `.lora_B.weight` for linear layers, `….lora_embedding_A` and `_B` for
embeddings, `….base_layer.weight` for the base weight of an adapted embedding. Variants of LoRA have further keys
(variants.py).
"""

from __future__ import annotations

import re
from pathlib import Path

from qlora_lite.checkpoints.safetensors_read import StoredTensor, stored_tensors
from qlora_lite.errors import CheckpointError
from qlora_lite.lora.kinds import EmbeddingKind, Kind
from qlora_lite.lora.variants import EXTRA_PARAMETERS

TENSOR_FILE = "adapter_model.safetensors"
PICKLED_FILE = "adapter_model.bin"
PREFIX = "base_model.model."
# peft stores the base weight of an adapted embedding together with the adapter.
BASE_COPY = ".base_layer.weight"
# Stands between the embedding's name and that suffix if rows of the embedding are trained.
TOKEN_ADAPTER = ".token_adapter"
SUFFIXES = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    **{extra.peft_key: name for name, extra in EXTRA_PARAMETERS.items()},
}
# The adapter's name in keys of a model's own state_dict, which some training programs write; peft removes it.
NAMED_ADAPTER = re.compile(r"(\.lora_\w+)\.default(?=\.|$)")
OLDER_SUFFIXES = {older: extra.peft_key for extra in EXTRA_PARAMETERS.values() for older in extra.older_peft_keys}


def current_key(key: str) -> str:
    """Returns the key that today's peft writes for this tensor.

    It has no adapter name (`lora_A.default.weight`); it has the prefix, which transformers' own loading of adapters
    does without; and it has today's names of the variants' parameters.
    """
    key = NAMED_ADAPTER.sub(r"\1", key)
    for older, current in OLDER_SUFFIXES.items():
        if key.endswith("." + older):
            key = key.removesuffix(older) + current
    return key if key.startswith(PREFIX) else PREFIX + key


def layer_and_part(key: str) -> tuple[str, str] | None:
    """Splits a current key into (layer, name of a LoraLayer's parameter); None for a key of another tensor."""
    suffix = next((suffix for suffix in SUFFIXES if key.endswith("." + suffix)), None)
    if suffix is None or not key.startswith(PREFIX):
        return None
    return key[len(PREFIX) : -len(suffix) - 1], SUFFIXES[suffix]


def peft_key(name: str, kind: Kind, part: str) -> str:
    """Returns peft's key of a parameter of this layer; part: its name on a LoraLayer."""
    if part in EXTRA_PARAMETERS:
        return f"{PREFIX}{name}.{EXTRA_PARAMETERS[part].peft_key}"
    if isinstance(kind, EmbeddingKind):
        return f"{PREFIX}{name}.{part.replace('lora_', 'lora_embedding_')}"
    return f"{PREFIX}{name}.{part}.weight"


def file_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of an adapter by the keys in its file. Raises CheckpointError for any other file format."""
    path = folder / TENSOR_FILE
    if not path.is_file() and (folder / PICKLED_FILE).is_file():
        raise CheckpointError(
            f"{folder / PICKLED_FILE} is a pickle, which can run any code and is never opened here; if you trust it, "
            f"convert it with peft: PeftModel.from_pretrained(base, folder).save_pretrained(folder)"
        )
    return stored_tensors(path)


def adapter_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Returns the tensors of an adapter by current keys. Raises CheckpointError if two have the same current key."""
    found: dict[str, StoredTensor] = {}
    in_file = file_tensors(folder)
    adapted = {PREFIX + split[0] for key in in_file if (split := layer_and_part(current_key(key))) is not None}
    for key, tensor in in_file.items():
        current = current_key(key)
        # In peft 0.6 an adapted embedding was a subclass of nn.Embedding: its base weight has the layer's own name.
        if current.removesuffix(".weight") in adapted:
            current = current.removesuffix(".weight") + BASE_COPY
        if current in found:
            raise CheckpointError(f"{folder / TENSOR_FILE} has {current} twice, as {found[current].name} and as {key}")
        found[current] = tensor
    return found
