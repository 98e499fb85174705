"""Makes checkpoints of known shapes with random weights, once, shard by shard, in the cache folder.

    python profiling/parts/model_shapes.py llama-1b       # prints the folder (2.2 GB)

The cost of a step does not depend on the values of the weights, so a shape stands for the model that has it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # run by path, it finds the other parts

import torch

from parts.example_models import cache_folder
from qlora_lite.checkpoints.atomic_folder import new_folder
from qlora_lite.checkpoints.hub import empty_model
from qlora_lite.checkpoints.safetensors_write import PlannedTensor, write_sharded
from qlora_lite.export.companion_files import write_companion_files

# llama-1b is the shape of TinyLlama-1.1B, llama3-8b that of Llama-3-8B; llama-300m and llama-3b are made up.
SHAPES: dict[str, dict[str, Any]] = {
    "llama-1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "llama-300m": {
        "vocab_size": 32000,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 22,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "llama-3b": {
        "vocab_size": 32000,
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 26,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "llama3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "tie_word_embeddings": False,
    },
    "smollm2-135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "tie_word_embeddings": True,
    },
}
INIT_STD = 0.02
SLICE_VALUES = 1 << 22
SHARDS = 5


def _slices(shape: tuple[int, ...], seed: int) -> Iterator[torch.Tensor]:
    if len(shape) == 1:  # norms
        yield torch.ones(shape, dtype=torch.bfloat16)
        return
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, SLICE_VALUES // shape[1])
    for start in range(0, shape[0], rows):
        count = min(rows, shape[0] - start)
        yield torch.randn((count, shape[1]), generator=generator).mul_(INIT_STD).bfloat16()


def make_shape(name: str, layers: int | None = None) -> Path:
    """Returns the folder of a shape's checkpoint, with another number of layers if given, and makes it if missing."""
    from transformers import LlamaConfig

    settings = dict(SHAPES[name])
    folder = cache_folder() / (name if layers is None else f"{name}-{layers}-layers")
    if folder.is_dir():
        return folder
    if layers is not None:
        settings["num_hidden_layers"] = layers
    model = empty_model(LlamaConfig(**settings), torch.bfloat16)
    plan = {
        key: PlannedTensor(tuple(tensor.shape), torch.bfloat16, partial(_slices, tuple(tensor.shape), seed))
        for seed, (key, tensor) in enumerate(model.state_dict().items())
    }
    largest_shard = sum(tensor.nbytes for tensor in plan.values()) // SHARDS + (64 << 20)
    with new_folder(folder) as temporary:
        write_sharded(temporary, plan, largest_shard)
        write_companion_files(model, None, temporary, torch.bfloat16)
    return folder


def make_adapter(folder: Path, rank: int = 16) -> Path:
    """Returns the folder of an adapter with random values on all linear layers, and makes it if missing."""
    from qlora_lite import LoraConfig, add_lora_, save_adapter
    from qlora_lite.checkpoints.hub import read_config
    from qlora_lite.lora.adapters import adapter_parameters

    target = folder.with_name(f"{folder.name}-adapter-{rank}")
    if target.is_dir():
        return target
    model = empty_model(read_config(folder), torch.bfloat16)
    model.config._name_or_path = str(folder)
    add_lora_(model, LoraConfig(rank=rank, alpha=2 * rank))
    for seed, (name, parameter) in enumerate(adapter_parameters(model).items()):
        owner, _, key = name.rpartition(".")
        values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)).mul_(INIT_STD)
        setattr(model.get_submodule(owner), key, torch.nn.Parameter(values))
    save_adapter(model, target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("shape", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, help="another number of layers")
    given = parser.parse_args()
    print(json.dumps({"folder": str(make_shape(given.shape, given.layers))}))


if __name__ == "__main__":
    main()
