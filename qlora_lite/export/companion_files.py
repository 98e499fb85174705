"""The files of an export that hold no tensors: config, generation config, tokenizer, processors, templates, licence.

`config.json` is the base's own file with what an export changes, so that keys that this release of transformers does
not know, and spellings of older ones (`rope_theta`, `torch_dtype`), are still there for other readers. Other files are
copied, all but weights and what belongs to them, code, pickles, and the base's model card, which describes the base:
an export gets a card of its own, with the licence and language of that one.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qlora_lite.checkpoints import hub
from qlora_lite.checkpoints.base_identity import BASE_FILE, model_identity
from qlora_lite.checkpoints.files import is_companion_name, is_regular, open_regular, read_json, write_json
from qlora_lite.checkpoints.repository.model_card import ModelCard, display_name, inherited, rows, write_card
from qlora_lite.errors import CheckpointError
from qlora_lite.export.report import REPORT_FILE
from qlora_lite.tasks import task_of

TEMPLATE_FOLDER = "additional_chat_templates"
# The largest tokenizers have 33 MB.
LARGEST_COMPANION = 256 << 20
# Files of JSON that are no companions: they are written anew, or belong to weights that are not copied.
CALIBRATION_FILE = "calibration.json"  # of packed weights, which belong to no other export
OWN_FILES = (hub.CONFIG_FILE, hub.GENERATION_FILE, REPORT_FILE, BASE_FILE, CALIBRATION_FILE)
OF_OTHER_WEIGHTS = (
    *("adapter_config.json", "params.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json"),
    *("trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"),
)
INDEX_SUFFIX = ".index.json"

DTYPE_KEYS = ("dtype", "torch_dtype")
# The entry of a config or a tokenizer's config that names code of the base's folder, which is not copied.
CODE_KEY = "auto_map"
QUANTIZATION = "quantization_config"
TIED = "tie_word_embeddings"
ROPE = "rope_parameters"
USE = """## Use

```python
from transformers import {auto_class}, AutoTokenizer

model = {auto_class}.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")
```

The id of this repository may stand for the folder.
"""
# How older releases of transformers spell the rope parameters.
OLD_ROPE = ("rope_theta", "rope_scaling")
# Keys of `to_dict` that do not tell whether a config was changed.
NOT_COMPARED = ("transformers_version", "architectures", QUANTIZATION, CODE_KEY, *DTYPE_KEYS)


def write_companion_files(
    model: Any,
    source: Path | None,
    target: Path,
    dtype: torch.dtype,
    quantization: Mapping[str, object] | None = None,
    *,
    untie: bool = False,
    is_whole: bool = True,
) -> None:
    """Writes the files of a checkpoint that hold no tensors to the folder `target`. The model is not changed.

    source: the folder that the model came from; None to write the model's own configs and nothing else. dtype: of the
    tensors. quantization: the `quantization_config` of a packed checkpoint. untie: sets `tie_word_embeddings` to False.
    is_whole: whether `target` has all tensors of `source`. If not, and the model is only a part of what the source's
    config describes (the language model of a vision-language model), it gets a config of its own.
    """
    config = None if source is None else _base_config(model, source, untie, is_whole)
    if config is None:
        _own_config(model, dtype, quantization, untie).save_pretrained(str(target))
    else:
        _set_dtype(config, str(dtype).removeprefix("torch."))
        if quantization is not None:
            config[QUANTIZATION] = dict(quantization)
        write_json(target / hub.CONFIG_FILE, config, sort_keys=False)
    _write_generation_config(model, source, target)
    if source is not None:
        _copy_companions(source, target)


def write_export_card(
    model: nn.Module,
    source: Path | None,
    target: Path,
    replaced: Path,
    relation: str | None,
    tags: Sequence[str],
    made: Mapping[str, object],
    more: str = "",
) -> None:
    """Writes the model card of an export to `target`, or keeps the one of the user in the folder that it replaces.

    source: the folder of the base. relation: to the base, as the hub names it. made: rows of a table that says how it
    was made. more: text below the table.
    """
    base = None if source is None else display_name(str(source.absolute()))
    verb = {"quantized": "packed", "finetune": "fine-tuned"}.get(relation or "", "exported")
    use = USE.format(auto_class=task_of(model).auto_class)
    body = f"{base or 'A base model'}, {verb} with qlora_lite.\n\n## How it was made\n\n{rows(made)}\n\n{more}\n\n{use}"
    title = f"{base or 'A base model'}, {verb}"
    card = ModelCard(title, base, relation, "transformers", tags, body, inherited(source))
    write_card(target, card, replaced=replaced)


def _own_config(model: Any, dtype: torch.dtype, quantization: Mapping[str, object] | None, untie: bool) -> Any:
    """Returns the model's config as transformers writes it."""
    config = type(model.config).from_dict(model.config.to_dict())
    config.dtype = dtype
    if hasattr(config, QUANTIZATION):
        del config.quantization_config
    if quantization is not None:
        config.quantization_config = dict(quantization)
    if untie:
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = False
    config.architectures = [type(model).__name__]
    return config


def _text_key(config: Any) -> str | None:
    """Returns the key under which a config holds that of its language model; None if it is that itself."""
    text = config.get_text_config()
    return next((key for key in config.sub_configs if getattr(config, key, None) is text), None)


def _base_config(model: Any, source: Path, untie: bool, is_whole: bool) -> dict[str, Any] | None:
    """Returns the source's config with the changes of the model's; None if the model's differs in kind."""
    try:
        file, base = read_json(source / hub.CONFIG_FILE), hub.read_config(source)
    except CheckpointError:  # transformers knows no such config; the model was loaded with code of its folder
        return None
    part, described, key = file, base, _text_key(base)
    if type(model.config) is not type(base):
        if not is_whole or key is None or type(model.config) is not type(getattr(base, key)):
            return None
        part, described = file.setdefault(key, {}), getattr(base, key)
    elif type(model).__name__ not in (file.get("architectures") or []):
        file["architectures"] = [type(model).__name__]
    file.pop(QUANTIZATION, None)
    _apply_changes_(part, described, described.to_dict(), model.config.to_dict())
    if untie:
        for tied in (file, file.get(key or "")):
            if isinstance(tied, dict):
                tied[TIED] = False
    return _without_code(file)


def _apply_changes_(file: dict[str, Any], config: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Writes to a config of a file in which keys its model's config differs from what the file gave.

    config, before: of the file, as an object and as plain data. after: of the model.
    """
    for key in before.keys() | after.keys():
        if key in NOT_COMPARED or key.startswith("_") or before.get(key) == after.get(key):
            continue
        part = getattr(config, key, None)
        if key in config.sub_configs and isinstance(file.get(key), dict) and hasattr(part, "sub_configs"):
            _apply_changes_(file[key], part, before.get(key) or {}, after.get(key) or {})
            continue
        for other in (name for name, real in config.attribute_map.items() if real == key):
            file.pop(other, None)
        if key == ROPE:
            for old in OLD_ROPE:
                file.pop(old, None)
        file[key] = after.get(key)


def _without_code(config: dict[str, Any]) -> dict[str, Any]:
    """Returns a config without the entries that name code of its own folder; those that name a repository stay."""
    found = config.get(CODE_KEY)
    if not isinstance(found, dict):
        return config
    elsewhere = {
        name: code
        for name, code in found.items()
        if all(part is None or "--" in str(part) for part in (code if isinstance(code, list) else [code]))
    }
    rest = {key: value for key, value in config.items() if key != CODE_KEY}
    return {**rest, CODE_KEY: elsewhere} if elsewhere else rest


def _set_dtype(config: dict[str, Any], dtype: str) -> None:
    """Sets the dtype under each spelling that a config of a file and its parts have."""
    for part in (config, *(value for key, value in config.items() if key.endswith("_config"))):
        if isinstance(part, dict):
            part.update({key: dtype for key in DTYPE_KEYS if key in part})
    if not any(key in config for key in DTYPE_KEYS):
        config["torch_dtype"] = dtype  # every release of transformers reads this one


def write_calibration(model: Any, source: Path | None, target: Path) -> None:
    """Writes what is known of how a packed model was calibrated: its report, or the file of the base's folder.

    Nothing for a model that is not calibrated, or whose weights were packed again since.
    """
    base = model_identity(model)
    if base is None or base.calibration is None or base.weights is None:
        return
    if (report := getattr(model, "calibration", None)) is not None:
        write_json(target / CALIBRATION_FILE, report.to_json(), sort_keys=False)
    elif source is not None and is_regular(source / CALIBRATION_FILE):
        _copy(source / CALIBRATION_FILE, target / CALIBRATION_FILE)


def _write_generation_config(model: Any, source: Path | None, target: Path) -> None:
    """Copies the source's generation config, or writes the model's if that was changed."""
    stored = None if source is None else hub.read_generation_config(source)
    current = getattr(model, "generation_config", None)
    if source is not None and stored is not None and current is not None and stored.to_dict() == current.to_dict():
        _copy(source / hub.GENERATION_FILE, target / hub.GENERATION_FILE)
    else:
        hub.save_generation_config(model, target)


def _copy_companions(source: Path, target: Path) -> None:
    """Copies the companion files of a checkpoint. Raises CheckpointError for one that is too large or unreadable."""
    skipped = (*OWN_FILES, *OF_OTHER_WEIGHTS)
    for path in sorted(source.iterdir()):
        name = path.name
        if is_companion_name(name) and name not in skipped and not name.endswith(INDEX_SUFFIX) and is_regular(path):
            _copy(path, target / name)
    # Chat templates other than the default one lie in a folder of their own.
    for path in sorted((source / TEMPLATE_FOLDER).glob("*.jinja")):
        if is_companion_name(path.name) and is_regular(path):
            (target / TEMPLATE_FOLDER).mkdir(exist_ok=True)
            _copy(path, target / TEMPLATE_FOLDER / path.name)


def _copy(path: Path, target: Path) -> None:
    """Copies a file and flushes it to the disk; JSON without a reference to code, which is not copied."""
    with open_regular(path, "a companion file of a checkpoint", LARGEST_COMPANION) as file:
        if path.suffix == ".json" and CODE_KEY.encode() in file.read():
            value = read_json(path)
            if (without := _without_code(value)) != value:
                write_json(target, without, sort_keys=False)
                return
        file.seek(0)
        with open(target, "wb") as copy:
            shutil.copyfileobj(file, copy)
            copy.flush()
            os.fsync(copy.fileno())
