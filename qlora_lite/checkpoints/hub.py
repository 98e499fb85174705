"""Configs, empty models and tokenizers from transformers.

Of this room, only this file and conversion.py import transformers, when it is first needed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_lite.architecture import config_value, dtype_as_loaded, keep_weights_
from qlora_lite.checkpoints.files import CONFIG_FILE as CONFIG_FILE
from qlora_lite.checkpoints.files import read_json
from qlora_lite.checkpoints.repository.download import cached_checkpoint, download_checkpoint
from qlora_lite.errors import CheckpointError, ConfigError, QLoRAError

GENERATION_FILE = "generation_config.json"
# Layers are built before anything is compared with the files. The deepest known models have a few hundred.
MAX_LAYERS = 4096


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError("this needs transformers; install qlora-lite[hf]") from error


@contextmanager
def _errors_of_transformers(problem: str) -> Iterator[None]:
    """Turns any exception, as transformers raises for bad files, into a CheckpointError with its first line.

    If that line ends in a colon, the second line follows.
    """
    try:
        yield
    except (QLoRAError, MemoryError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        first_line = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
        raise CheckpointError(f"{problem}: {first_line}") from error


def checkpoint_folder(path_or_id: str | Path, weights: bool = True) -> Path:
    """Returns the local folder of a checkpoint; an id that is not a folder is fetched from the hub.

    weights: False fetches config, tokenizer and the like alone. Raises CheckpointError if there is no such checkpoint.
    """
    folder = Path(path_or_id)
    if folder.is_dir():
        if not (folder / CONFIG_FILE).is_file():
            raise CheckpointError(f"{folder} has no {CONFIG_FILE}; name a folder saved by transformers")
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; name the checkpoint's folder")
    name = str(path_or_id)
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or set(name) & set("\\:"):
        raise CheckpointError(f"{path_or_id} does not exist")
    return download_checkpoint(name, weights)


def read_config(folder: Path) -> Any:
    """Reads the transformers config of a checkpoint folder, less `quantization_config`. No remote code is run."""
    quantization_config(folder)
    with _errors_of_transformers(f"{folder} has no config that transformers knows"):
        config = _transformers().AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    _delete_quantization_config(config)
    layers = config_value(config, "num_hidden_layers")
    if isinstance(layers, int) and layers > MAX_LAYERS:
        raise CheckpointError(f"{folder} has num_hidden_layers {layers}; at most {MAX_LAYERS} are built")
    return config


def _delete_quantization_config(config: Any) -> None:
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def quantization_config(folder: Path) -> dict[str, object] | None:
    """Reads `quantization_config` of a checkpoint folder's config; None if there is none, or no config.

    Raises CheckpointError if the config, or this entry, is not a JSON object.
    """
    if not (folder / CONFIG_FILE).is_file():
        return None
    found = read_json(folder / CONFIG_FILE).get("quantization_config")
    if found is not None and not isinstance(found, dict):
        raise CheckpointError(f"quantization_config in {folder / CONFIG_FILE} should be a JSON object; got {found!r}")
    return found


def _causal_class(config: Any) -> Callable[..., Any]:
    """Returns what makes the causal language model of a config.

    That is AutoModelForCausalLM, and for a config that it does not know (the text part of Mllama or Emu 3, saved by
    itself) the causal class that the config names.
    """
    automatic = _transformers().AutoModelForCausalLM
    name = (config.architectures or [""])[0]
    named = getattr(_transformers(), name, None) if name.endswith("ForCausalLM") else None
    known = named is None or type(config) in automatic._model_mapping
    made: Any = automatic.from_config if known else named._from_config  # type: ignore[union-attr]
    return made  # type: ignore[no-any-return]


def empty_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """Returns the causal language model of a config on the meta device: shapes and dtypes without values.

    dtype: of its floats, but for those that transformers keeps in float32 (`_keep_in_fp32_modules`), or that the model
    makes in a dtype of their own.
    """
    with _errors_of_transformers(f"no causal language model can be built for model type {config.model_type!r}"):
        with torch.device("meta"):
            model: nn.Module = _causal_class(config)(config, dtype=dtype)
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype_as_loaded(model, name, tensor.dtype))
        keep_weights_(model)
        return model.eval()


def read_generation_config(folder: Path) -> Any:
    """Returns the generation config of a checkpoint folder, None if it has none."""
    if not (folder / GENERATION_FILE).is_file():
        return None
    with _errors_of_transformers(f"{folder / GENERATION_FILE} is not a generation config"):
        return _transformers().GenerationConfig.from_pretrained(str(folder))


def whole_model(folder: Path) -> nn.Module | None:
    """Returns the empty model of the class that a checkpoint's config names, None if transformers cannot build it."""
    config = read_config(folder)
    names: list[str] = config.architectures or []
    kind = getattr(_transformers(), names[0], None) if names else None
    if kind is None:
        return None
    try:
        with torch.device("meta"):
            model: nn.Module = kind(config)
    except Exception:  # the code of any model; then nothing is known about its parts
        return None
    return model


def load_generation_config_(model: nn.Module, folder: Path) -> None:
    """Sets `model.generation_config` from the checkpoint folder, if it has one."""
    if (found := read_generation_config(folder)) is not None:
        model.generation_config = found


def save_generation_config(model: Any, folder: Path) -> None:
    """Writes the generation config of a model, if it has one. Raises CheckpointError if transformers refuses it."""
    if getattr(model, "generation_config", None) is not None:
        with _errors_of_transformers("the generation config cannot be saved"):
            model.generation_config.save_pretrained(str(folder))


def load_tokenizer(path_or_id: str | Path) -> Any:
    """Returns the tokenizer of a checkpoint. Its end token serves for padding if it has no padding token."""
    folder = checkpoint_folder(path_or_id, weights=False)
    with _errors_of_transformers(f"{folder} has no tokenizer that transformers can load"):
        tokenizer = _transformers().AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def model_folder(model: nn.Module) -> Path | None:
    """Returns the folder that a model was loaded from, None if it was not loaded from one.

    Raises CheckpointError if the folder does not exist any more.
    """
    config = getattr(model, "config", None)
    name = getattr(config, "_name_or_path", "") or ""
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    found = cached_checkpoint(name, getattr(config, "_commit_hash", None))
    if found is None:
        raise CheckpointError(
            f"the model came from {name}, which does not exist any more, so its tokenizer cannot be copied; "
            f"set model.config._name_or_path to its folder, or to '' to export without a tokenizer"
        )
    return found
