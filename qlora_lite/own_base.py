"""A packed base that belongs to one adapter: LoftQ of several iterations packs W - scaling B A, not W.

No other program, and no other load of the checkpoint, has these bytes. So the weights say of themselves that they are
not the checkpoint's, an adapter on them is saved with the SHA-256 of all that it stands on, and loading or merging it
elsewhere is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from qlora_lite.quantization.config import QuantConfig
from qlora_lite.quantization.packed_weight import PackedWeight
from qlora_lite.storage import raw_bytes

# In adapter_config.json, where peft passes over what it does not know.
DIGEST_KEY = "packed_base_sha256"
HOW_TO = "load the base that save_quantized wrote of the model under that adapter"


def packed_anew(old: PackedWeight, matrix: Tensor, name: str) -> PackedWeight:
    """Another matrix `(out, in)` packed as `old` is, which is left as it was; QuantizationError if it cannot be."""
    config = QuantConfig(old.format, old.blocksize, old.double_quant, int8_activations=old.int8_activations)
    new = PackedWeight.of(matrix, config, name=name)
    new.of_checkpoint = False
    return new


def own_weights(model: nn.Module) -> list[PackedWeight]:
    """The packed weights of a model that are not its checkpoint's."""
    return [module for module in model.modules() if isinstance(module, PackedWeight) and not module.of_checkpoint]


def holders(model: nn.Module, weight: Any) -> int:
    """How many modules have this very weight: more than one where it is tied."""
    return sum(getattr(module, "weight", None) is weight for module in model.modules())


def digest_of(weights: Iterable[tuple[str, PackedWeight]]) -> str:
    """SHA-256, in hex, of the names of layers and the bytes of their packed weights, in the order that they come in."""
    digest = hashlib.sha256()
    for name, weight in weights:
        digest.update(f"{name} {weight.format} {weight.blocksize} {tuple(weight.shape)}\n".encode())
        for _, buffer in sorted(weight.state_dict().items()):
            digest.update(raw_bytes(buffer))
    return digest.hexdigest()


def is_base_of(digest: str, weights: Mapping[str, Any]) -> bool:
    """Whether these are the packed weights, by name of layer, that an adapter was saved for."""
    if not all(isinstance(weight, PackedWeight) for weight in weights.values()):
        return False
    return digest_of(sorted(weights.items())) == digest
