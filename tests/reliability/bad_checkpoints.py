"""Makes bad checkpoints from a seed: folders of a small model, plain or packed, with one thing wrong."""

from __future__ import annotations

import functools
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from bad_files import STRANGE, TENSORS, canary, damaged_safetensors, damaged_text, nested, pickled
from example_model import make_tiny_model
from qlora_lite import QuantConfig, load_quantized
from qlora_lite.export.quantized import save_quantized

CONFIG = "config.json"
OPTIONS = (
    *("model_type", "architectures", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size"),
    *("intermediate_size", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta", "tie_word_embeddings"),
    *("quantization_config", "dtype", "torch_dtype", "max_position_embeddings", "hidden_act", "auto_map"),
)
QUANTIZATION_OPTIONS = (
    *("quant_method", "load_in_4bit", "load_in_8bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"),
    *("bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "llm_int8_skip_modules", "llm_int8_threshold"),
)


@functools.cache
def good_folder(packed: bool) -> Path:
    """Returns the folder of a small checkpoint, made once in a process."""
    folder = Path(tempfile.mkdtemp(prefix="good-"))
    plain = make_tiny_model(folder / "plain")
    if not packed:
        return plain
    save_quantized(load_quantized(plain, QuantConfig()), folder / "packed")
    return folder / "packed"


def _special(path: Path, rng: random.Random) -> str:
    """Replaces a file by something that is not a regular file of this kind."""
    path.unlink(missing_ok=True)
    kinds: dict[str, Callable[[], Any]] = {
        "pipe": lambda: os.mkfifo(path),
        "folder": path.mkdir,
        "device": lambda: path.symlink_to("/dev/zero"),
        "loop": lambda: path.symlink_to(path.name),
        "dangling link": lambda: path.symlink_to("nothing"),
        "nothing": lambda: None,
        "empty": path.touch,
        "pickle": lambda: path.write_bytes(rng.choice([canary, pickled])(path.parent)),
        "pickle as well": lambda: (path.parent / "pytorch_model.bin").write_bytes(pickled(path.parent)),
    }
    what = rng.choice(sorted(kinds))
    kinds[what]()
    return f"{what} as {path.name}"


def _other_option(folder: Path, rng: random.Random) -> str:
    config = json.loads((folder / CONFIG).read_text())
    section = config
    options: tuple[str, ...] = OPTIONS
    if "quantization_config" in config and rng.random() < 0.5:
        section, options = config["quantization_config"], QUANTIZATION_OPTIONS
    option, value = rng.choice(options), rng.choice([*STRANGE, 64, "gelu", nested(30)])
    section[option] = value
    (folder / CONFIG).write_text(json.dumps(config))
    return f"{option} = {str(value)[:40]}"


def _other_tensor(folder: Path, rng: random.Random) -> str:
    """Writes a sound safetensors file in which one tensor does not suit the model."""
    tensors = safetensors.torch.load_file(folder / TENSORS)
    name = rng.choice(sorted(tensors))
    tensor = tensors.pop(name)
    spoilt = tensor.clone()
    if tensor.is_floating_point() and tensor.numel():
        spoilt.view(-1)[rng.randrange(tensor.numel())] = rng.choice([float("nan"), float("inf"), -float("inf")])
    changes: dict[str, torch.Tensor | None] = {
        "lost": None,
        "transposed": tensor.T.contiguous() if tensor.dim() == 2 else tensor[None],
        "shorter": tensor[:1] if tensor.dim() else tensor[None],
        "as bytes": tensor.reshape(-1).view(torch.uint8),
        "as fp64": tensor.double(),
        "as int64": tensor.long(),
        "not finite": spoilt,
        "empty": tensor.new_empty(0),
    }
    what = rng.choice(sorted(changes))
    changed = changes[what]
    if changed is not None:
        tensors[name] = changed.clone()
    safetensors.torch.save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    return f"{name} {what}"


def damage_checkpoint(folder: Path, rng: random.Random) -> str:
    """Writes a checkpoint with one thing wrong into the folder, and returns a description of it."""
    good = good_folder(packed=rng.random() < 0.5)
    for path in good.iterdir():
        if path.name in (CONFIG, TENSORS):
            shutil.copy(path, folder)
    kind = rng.randrange(6)
    if kind == 0:
        return _special(folder / rng.choice([CONFIG, TENSORS]), rng)
    if kind == 1:
        (folder / CONFIG).write_bytes(damaged_text((folder / CONFIG).read_bytes(), rng))
        return "config's bytes"
    if kind == 2:
        what, data = damaged_safetensors((folder / TENSORS).read_bytes(), rng)
        (folder / TENSORS).write_bytes(data)
        return what
    return _other_tensor(folder, rng) if kind in (3, 4) else _other_option(folder, rng)
