"""Configs, empty models and tokenizers from transformers.

Of this room, only this file and conversion.py import transformers, when it is first needed.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_lite.architecture import config_value, dtype_as_loaded, keep_weights_, text_config
from qlora_lite.checkpoints.files import CONFIG_FILE as CONFIG_FILE
from qlora_lite.checkpoints.files import did_you_mean, has_config, read_json
from qlora_lite.checkpoints.repository.download import cached_checkpoint, download_checkpoint
from qlora_lite.errors import CheckpointError, ConfigError, QLoRAError
from qlora_lite.patches import patched_attribute
from qlora_lite.tasks import CAUSAL_LM, TASKS, Task, task_named, task_of

GENERATION_FILE = "generation_config.json"
VIDEOS = "video_processor"  # the part of a processor
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
        raise CheckpointError(f"{path_or_id} does not exist{did_you_mean(folder, has_config)}")
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


def _classes(task: Task, config: Any) -> list[type]:
    """Returns the classes of transformers that load a config for a task."""
    mapping = getattr(_transformers(), task.auto_class)._model_mapping
    found = mapping.get(type(config), ())
    return list(found) if isinstance(found, (list, tuple)) else [found]


def _declared_class(config: Any) -> str:
    """Returns the name of the class that a checkpoint was saved from, an empty string if its config does not say."""
    return next(iter(config.architectures or ()), "")


def _declared_task(config: Any) -> Task:
    """Returns the task of the class that a config names; that of causal language models if it names no known one."""
    declared = _declared_class(config)
    tasks = (task for task in TASKS.values() if any(made.__name__ == declared for made in _classes(task, config)))
    return next(tasks, CAUSAL_LM)


def task_for(config: Any, task: str | type | None = None) -> Task:
    """Returns the task of the model that `model_class` chooses."""
    if isinstance(task, str) and task in TASKS:
        return TASKS[task]
    return _declared_task(config) if task is None else task_of(empty_model(config, torch.bfloat16, task))


def tasks_of_class(made: type, config: Any) -> list[Task]:
    """Returns the tasks for which transformers makes this class of a config."""
    return [task for task in TASKS.values() if made in _classes(task, config)]


def set_padding_(config: Any, pad_token_id: int) -> None:
    """Writes the padding token to a config. Classifiers on decoders find the end of each row by it."""
    for part in (config, text_config(config)):
        part.pad_token_id = pad_token_id


def _class_of(task: Task, config: Any) -> Any:
    """Returns the class of transformers for a task and a config. Raises ConfigError if there is none.

    Of several classes it is the one that the config names, else the first. A causal language model that the automatic
    class does not know (the text part of Mllama or Emu 3, saved by itself) is of the class that its config names.
    """
    classes, declared = _classes(task, config), _declared_class(config)
    named = [made for made in classes if made.__name__ == declared]
    if not classes and task is CAUSAL_LM and declared.endswith("ForCausalLM"):
        named = [made] if (made := getattr(_transformers(), declared, None)) is not None else []
    if named or classes:
        return (named or classes)[0]
    others = [other.name for other in TASKS.values() if _classes(other, config)]
    raise ConfigError(
        f"transformers has no class for the task {task.name!r} of model type {config.model_type!r}; it has some for: "
        f"{', '.join(others) or 'none that is known here'}"
    )


def model_class(config: Any, task: str | type | None = None) -> Any:
    """Returns the class of transformers that a model of a config is made of.

    task: a name in `tasks.TASKS`, a class of transformers or its name; None for what the config's `architectures` say.
    Raises ConfigError for an unknown task, or one that transformers has no class for.
    """
    if task is None:
        return _class_of(_declared_task(config), config)
    if isinstance(task, str) and task not in TASKS and hasattr(_transformers(), task):
        task = getattr(_transformers(), task)
    if isinstance(task, str):
        return _class_of(task_named(task), config)
    takes = getattr(task, "config_class", None)
    if takes is None or not hasattr(task, "_from_config"):
        raise ConfigError(f"task must be one of {', '.join(TASKS)}, or a class of transformers; got {task!r}")
    if not isinstance(config, takes) and not isinstance(text_config(config), takes):
        raise ConfigError(f"{task.__name__} is made from a {takes.__name__}; got a {type(config).__name__}")
    return task


def _config_for(made: Any, config: Any) -> Any:
    """Returns the part of a config that a class is made from: of a vision-language model's, perhaps the text part."""
    text = text_config(config)
    return text if made.config_class is type(text) else config


def set_labels_(config: Any, labels: int | Sequence[str]) -> None:
    """Writes the labels of a classifier to a config: their names, or their number; one is a value to regress on."""
    names = [f"LABEL_{index}" for index in range(labels)] if isinstance(labels, int) else list(labels)
    if not names or len(set(names)) != len(names) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"labels must be a number of at least 1 or different names; got {labels!r}")
    config.id2label = dict(enumerate(names))  # which sets num_labels
    config.label2id = {name: index for index, name in enumerate(names)}


def empty_model(config: Any, dtype: torch.dtype, task: str | type | None = None) -> nn.Module:
    """Returns the model of a config on the meta device: shapes and dtypes without values.

    dtype: of its floats, but for those that transformers keeps in float32 (`_keep_in_fp32_modules`), or that the model
    makes in a dtype of their own. task: as of `model_class`.
    """
    with _errors_of_transformers(f"no model can be built for model type {config.model_type!r}"):
        made = model_class(config, task)
        with torch.device("meta"):
            model: nn.Module = made._from_config(_config_for(made, config), dtype=dtype)
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


def load_processor(path_or_id: str | Path) -> Any:
    """Returns the processor of a vision-language checkpoint, for text and images; None for a checkpoint of text alone.

    Without torchvision, which only videos need, it is a processor without a part for videos.
    Raises CheckpointError for a processor that transformers cannot load, and ConfigError if pillow is missing.
    """
    folder = checkpoint_folder(path_or_id, weights=False)
    config, transformers = read_config(folder), _transformers()
    if type(config) not in transformers.AutoModelForImageTextToText._model_mapping:
        return None
    if importlib.util.find_spec("PIL") is None:
        raise ConfigError("images need pillow; install qlora-lite[vision]")
    with _errors_of_transformers(f"{folder} has no processor that transformers can load"):
        names = importlib.import_module("transformers.models.auto.processing_auto").PROCESSOR_MAPPING_NAMES
        kind: Any = getattr(transformers, names[config.model_type])
        module = importlib.import_module(kind.__module__)
        if importlib.util.find_spec("torchvision") is None and VIDEOS in kind.get_attributes():
            kind = _without_videos(kind)
        # SmolVLM's asks for a package that only its videos use.
        words = getattr(module, "num2words", None) or str
        with patched_attribute(module, "num2words", words) if hasattr(module, "num2words") else nullcontext():
            return kind.from_pretrained(str(folder), trust_remote_code=False)


def _without_videos(kind: Any) -> Any:
    """Returns a class of processors that does not load the part for videos."""

    class ImagesOnly(kind):  # type: ignore[misc]
        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in kind.get_attributes() if name != VIDEOS]

        @classmethod
        def from_args_and_dict(cls, args: Sequence[Any], processor_dict: dict[str, Any], **options: Any) -> Any:
            place = kind.get_attributes().index(VIDEOS)
            rest = {name: value for name, value in processor_dict.items() if name != VIDEOS}
            return super().from_args_and_dict([*args[:place], None, *args[place:]], rest, **options)

        def check_argument_for_proper_class(self, argument_name: str, argument: object) -> Any:
            return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)

    ImagesOnly.__name__, ImagesOnly.__module__ = kind.__name__, kind.__module__
    return ImagesOnly


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
