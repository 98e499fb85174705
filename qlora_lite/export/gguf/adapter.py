"""Writes an adapter alone as a GGUF file, which llama.cpp adds to its base (`--lora`) and ollama names ADAPTER.

llama.cpp multiplies B A of every layer by one alpha over the rank of its matrices (src/llama-adapter.h). Where a layer
is scaled otherwise (rsLoRA, alpha_pattern), B is multiplied by what is lacking. Rows of B move as those of the weight.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from qlora_lite.checkpoints import hub
from qlora_lite.checkpoints.atomic_folder import check_free_space, check_output_is_not_input, new_folder
from qlora_lite.checkpoints.base_identity import PACKED_HASH_KEY, check_trained_on_checkpoint
from qlora_lite.checkpoints.safetensors_read import StoredTensor
from qlora_lite.errors import CheckpointError, listing
from qlora_lite.export.gguf.families import Family, family_of
from qlora_lite.export.gguf.library import FILE_TYPES, FLOATS, GgufTensor, check_file, gguf, tensor_names, write_gguf
from qlora_lite.export.gguf.merge import check_type
from qlora_lite.export.gguf.modelfile import adapter_modelfile, write_modelfile
from qlora_lite.export.gguf.tensors import EMBEDDING, HEAD, row_order
from qlora_lite.lora.peft.compatibility import llama_cpp_compatibility
from qlora_lite.lora.peft.describe import AdaptedLayer, AdapterDescription, describe_adapter
from qlora_lite.lora.peft.keys import adapter_tensors, layer_and_part

# Parts of keys that llama.cpp's converter writes and its loader leaves out (src/llama-adapter.cpp).
PASSED_OVER = ("_layernorm", ".norm")


@dataclass(frozen=True)
class GgufAdapter:
    """What was written: the name of the file, the architecture of its base, and its layers."""

    file: str
    architecture: str
    layers: int
    alpha: float
    bytes: int


def adapter_to_gguf(
    adapter: str | Path,
    path_or_id: str | Path,
    folder: str | Path,
    type: str = "f16",
    *,
    any_base: bool = False,
    overwrite: bool = False,
) -> GgufAdapter:
    """Writes an adapter on disk as a GGUF file in a new folder, with a Modelfile for ollama.

    path_or_id: the base, of which the config is read. type: `f32`, `f16` or `bf16`. any_base: accept a base that the
    adapter was not trained on. Raises CheckpointError, listing the reasons, for what llama.cpp does not take: DoRA,
    modules trained as a whole, experts, convolutions, an adapter on a tied head or embedding; the errors of
    `export_gguf`; QuantizationError for values above the range of `type`.
    """
    check_type(type, tuple(FLOATS))
    adapter, base, folder = Path(adapter), hub.checkpoint_folder(path_or_id), Path(folder)
    check_output_is_not_input(folder, base, adapter)
    config: Any = hub.read_config(base)
    family = family_of(config)
    described = describe_adapter(adapter)
    if not any_base:
        check_trained_on_checkpoint(adapter, base)
    alpha = float(str(described.config.get("lora_alpha", 0)))
    tensors = _tensors(described, family, config, alpha, type)
    settings = {
        "type": "adapter",
        "name": adapter.resolve().name,
        "file_type": gguf().LlamaFileType[FILE_TYPES[type]],
        "quantization_version": gguf().GGML_QUANT_VERSION,
    }
    file = f"adapter-{type}.gguf"
    with new_folder(folder, overwrite) as temporary:
        check_free_space(folder, sum(tensor.bytes_written for tensor in tensors))
        keys: dict[str, str | float] = {"adapter.type": "lora", "adapter.lora.alpha": alpha}
        written = write_gguf(temporary / file, family.architecture, settings, tensors, keys)
        check_file(temporary / file, written)
        write_modelfile(temporary, adapter_modelfile(file, base.resolve()))
        size = (temporary / file).stat().st_size
    return GgufAdapter(file, family.architecture, len(described.layers), alpha, size)


def _tensors(described: AdapterDescription, family: Family, config: Any, alpha: float, type: str) -> list[GgufTensor]:
    """Returns A and B of each layer under llama.cpp's names. Raises CheckpointError, listing what it does not take."""
    named = tensor_names(family.architecture, config.num_hidden_layers)
    targets = {layer.name: named(f"{layer.name}.weight") for layer in described.layers}
    reasons = list(llama_cpp_compatibility(described, rescaled=True).reasons)
    if norms := [key for key in described.auxiliary if any(part in key for part in PASSED_OVER)]:
        reasons.append(f"norms, which llama.cpp passes over: {listing(norms, 3)}")
    if described.config.get(PACKED_HASH_KEY) is not None:
        reasons.append("LoftQ: A and B belong to packed weights that no GGUF file has")
    if unknown := [name for name, target in targets.items() if target is None]:
        reasons.append(f"layers that llama.cpp's {family.architecture} does not have: {listing(unknown, 3)}")
    ties = config.tie_word_embeddings or not family.own_head
    if tied := [name for name, target in targets.items() if ties and target in (EMBEDDING, HEAD)]:
        reasons.append(f"one of two tied weights, which llama.cpp has once: {listing(tied, 3)}")
    if reasons:
        raise CheckpointError(
            f"{described.folder} cannot be written as a GGUF adapter, because of {'; '.join(reasons)}; merge it instead"
        )
    stored: dict[tuple[str, str], StoredTensor] = {
        split: tensor
        for key, tensor in adapter_tensors(described.folder).items()
        if (split := layer_and_part(key)) is not None
    }
    return [
        tensor
        for layer in described.layers
        for tensor in _pair(layer, str(targets[layer.name]), stored, family, config, alpha, type)
    ]


def _pair(
    layer: AdaptedLayer,
    target: str,
    stored: dict[tuple[str, str], StoredTensor],
    family: Family,
    config: Any,
    alpha: float,
    type: str,
) -> list[GgufTensor]:
    """Returns A and B of a layer. Those of an embedding give a row of A for each token."""
    lora_A, lora_B = stored[layer.name, "lora_A"], stored[layer.name, "lora_B"]
    order = row_order(f"{layer.name}.weight", family, config)
    factor = layer.scaling / (alpha / layer.rank)
    pieces_A: Callable[[], list[Tensor]] = functools.partial(_read, lora_A, None, 1.0, layer.kind == "embedding")
    pieces_B: Callable[[], list[Tensor]] = functools.partial(_read, lora_B, order, factor, False)
    shape_A = lora_A.shape[::-1] if layer.kind == "embedding" else lora_A.shape
    return [
        GgufTensor(f"{target}.lora_a", shape_A, type, pieces_A),
        GgufTensor(f"{target}.lora_b", lora_B.shape, type, pieces_B),
    ]


def _read(
    stored: StoredTensor, order: Callable[[Tensor], Tensor] | None, factor: float, transposed: bool
) -> list[Tensor]:
    values = stored.read().float()
    values = values if factor == 1.0 else values * factor
    values = values if order is None else order(values)
    return [values.t() if transposed else values]
