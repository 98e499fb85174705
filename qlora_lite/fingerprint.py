"""What a base is, in a few short sums: to tell whether adapters meet the very base that they were trained on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from qlora_lite.checkpoints.base_identity import sum_of_json
from qlora_lite.checkpoints.safetensors_write import raw_bytes
from qlora_lite.lora.layer import LoraLayer
from qlora_lite.signals import poll

# Rows of a tensor that are copied at a time where its bytes do not lie one after the other, or elsewhere.
SLICE_BYTES = 8 << 20
# Facts of packed weights and layers that decide what they compute.
FACTS = ("format", "blocksize", "double_quant", "int8_activations", "compute_dtype", "transposed")
# Of a model's configuration, what says where it came from or by whom it was written.
ORIGINS = ("_name_or_path", "transformers_version")


def _frozen(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every tensor that training leaves alone: no adapters, nor the starts that they are counted from."""
    own = {
        id(value)
        for layer in model.modules()
        if isinstance(layer, LoraLayer)
        for value in (*layer.parameters(recurse=False), *layer.buffers(recurse=False))
    }
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if id(value) not in own and not value.requires_grad:
            yield name, value


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    whole = tensor.detach()
    if whole.dim() == 0 or (whole.is_contiguous() and whole.device.type == "cpu"):
        parts: Any = (whole,)
    else:
        parts = whole.split(max(1, SLICE_BYTES // max(1, whole[:1].nbytes)))
    for part in parts:
        yield raw_bytes(part)


def base_fingerprint(model: nn.Module) -> dict[str, str]:
    """SHA-256 sums of a base: `layout` (names, shapes, dtypes, formats), `values` (all bytes), `config`.

    Every byte counts, packed ones as they are packed: 1 to 2 GB are summed in a second.
    """
    layout: list[object] = []
    values = hashlib.sha256()
    for name, tensor in _frozen(model):
        layout.append([name, list(tensor.shape), str(tensor.dtype)])
        for piece in _pieces(tensor):
            poll()
            values.update(piece)
    for name, module in model.named_modules():
        layout.append([name, type(module).__name__, {fact: getattr(module, fact, None) for fact in FACTS}])
    describe = getattr(getattr(model, "config", None), "to_dict", None)
    config = {} if describe is None else {key: value for key, value in describe().items() if key not in ORIGINS}
    return {"layout": sum_of_json(layout), "values": values.hexdigest(), "config": sum_of_json(config)}
