"""What is asked of transformers: a config, an empty model, a tokenizer, which module is the head.

The only file that imports transformers; it does so when it is first needed.
"""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_lite.checkpoints.files import read_json
from qlora_lite.errors import CheckpointError, ConfigError, QLoRAError

CONFIG_FILE = "config.json"
GENERATION_FILE = "generation_config.json"
TEMPLATE_FOLDER = "additional_chat_templates"
CHECKPOINT_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json"),
)
# Each is built before anything is compared with the files; the deepest known models have some hundred.
MOST_LAYERS = 4096


def _transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError("this needs transformers; install qlora-lite[hf]") from error


@contextmanager
def _checkpoint_errors(what: str) -> Iterator[None]:
    """transformers reports bad files by any exception, in paragraphs: the first line is the fact, or leads to it."""
    try:
        yield
    except (QLoRAError, MemoryError):
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        first_line = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
        raise CheckpointError(f"{what}: {first_line}") from error


def checkpoint_folder(path_or_id: str | Path) -> Path:
    """The local folder of a checkpoint; a name that is no folder is looked up on (and fetched from) the hub."""
    folder = Path(path_or_id)
    if folder.is_dir():
        if not (folder / CONFIG_FILE).is_file():
            raise CheckpointError(f"{folder} has no {CONFIG_FILE}; name a folder saved by transformers")
        return folder
    if folder.exists():
        raise CheckpointError(f"{folder} is a file; name the checkpoint's folder")
    if str(path_or_id).count("/") > 1 or str(path_or_id).startswith((".", "/", "~")):
        raise CheckpointError(f"{path_or_id} does not exist")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=CHECKPOINT_PATTERNS))
    except Exception as error:  # the hub client raises its own, httpx's and OS errors
        first_line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise CheckpointError(f"{path_or_id} is no local folder and cannot be fetched: {first_line}") from error


def read_config(folder: Path) -> Any:
    """The transformers config of a checkpoint folder, as if nothing in it were packed. No remote code is run."""
    quantization_config(folder)
    with _checkpoint_errors(f"{folder} has no config that transformers knows"):
        config = _transformers().AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
    _forget_quantization(config)
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MOST_LAYERS:
        raise CheckpointError(f"{folder} has num_hidden_layers {layers}; at most {MOST_LAYERS} are built")
    return config


def _forget_quantization(config: Any) -> None:
    if hasattr(config, "quantization_config"):
        del config.quantization_config


def quantization_config(folder: Path) -> dict[str, Any] | None:
    """How a checkpoint folder says that its weights are packed; None where it says nothing, or has no config.

    CheckpointError for a config that is no JSON object, or says it in another form.
    """
    if not (folder / CONFIG_FILE).is_file():
        return None
    said = read_json(folder / CONFIG_FILE).get("quantization_config")
    if said is not None and not isinstance(said, dict):
        raise CheckpointError(f"quantization_config in {folder / CONFIG_FILE} should be a JSON object; got {said!r}")
    return said


def empty_model(config: Any, dtype: torch.dtype) -> nn.Module:
    """The causal language model of a config on the meta device: shapes without bytes."""
    with _checkpoint_errors(f"no causal language model can be built for model type {config.model_type!r}"):
        with torch.device("meta"):
            model: nn.Module = _transformers().AutoModelForCausalLM.from_config(config, dtype=dtype)
        return model.eval()


def load_generation_config_(model: Any, folder: Path) -> None:
    """Gives a model the generation config of its checkpoint, if there is one."""
    if (folder / GENERATION_FILE).is_file():
        with _checkpoint_errors(f"{folder / GENERATION_FILE} is no generation config"):
            model.generation_config = _transformers().GenerationConfig.from_pretrained(str(folder))


def load_tokenizer(path_or_id: str | Path) -> Any:
    """The tokenizer of a checkpoint, with a padding token (its end token where there is none)."""
    folder = checkpoint_folder(path_or_id)
    with _checkpoint_errors(f"{folder} has no tokenizer that transformers can load"):
        tokenizer = _transformers().AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def save_config_and_tokenizer(
    model: Any,
    source: Path | None,
    target: Path,
    dtype: torch.dtype,
    quantization: dict[str, Any] | None = None,
    *,
    untie: bool = False,
) -> None:
    """Writes what a checkpoint has beside its tensors: config (new dtype), generation config, tokenizer, template.

    quantization: how its weights are packed, for the config; None for a plain checkpoint. untie: whether the written
    config says that no weights are tied. The model's own config is left as it is.
    """
    config = type(model.config).from_dict(model.config.to_dict())
    config.dtype = dtype
    _forget_quantization(config)
    if quantization is not None:
        config.quantization_config = quantization
    if untie:
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
    config.architectures = [type(model).__name__]
    config.save_pretrained(str(target))
    if getattr(model, "generation_config", None) is not None:
        with _checkpoint_errors("the generation config cannot be saved"):
            model.generation_config.save_pretrained(str(target))
    if source is not None:
        # sentencepiece's models have a name of their own in many a family: spiece, sentencepiece.bpe, spm, …
        for name in sorted({*TOKENIZER_FILES, *(path.name for path in source.glob("*.model"))}):
            if (source / name).is_file():
                shutil.copyfile(source / name, target / name)
        # Chat templates that have a name of their own lie in a folder beside the default one.
        for template in sorted((source / TEMPLATE_FOLDER).glob("*.jinja")):
            (target / TEMPLATE_FOLDER).mkdir(exist_ok=True)
            shutil.copyfile(template, target / TEMPLATE_FOLDER / template.name)


def model_folder(model: Any) -> Path | None:
    """The folder that the model was loaded from, None for one that was not loaded. CheckpointError if it is gone."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    if not name or Path(name).is_dir():
        return Path(name) if name else None
    from huggingface_hub import snapshot_download

    at: Any = {"revision": getattr(model.config, "_commit_hash", None), "allow_patterns": CHECKPOINT_PATTERNS}
    try:
        return Path(snapshot_download(name, local_files_only=True, **at))
    except Exception as error:  # the hub client raises its own and ValueError
        raise CheckpointError(
            f"the model came from {name}, which is not there any more, and its tokenizer would be missing; "
            f"set model.config._name_or_path to its folder, or to '' to export without a tokenizer"
        ) from error
