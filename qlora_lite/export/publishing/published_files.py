"""Which files of a folder go up to the hub: those that an adapter or a checkpoint is known to have, once it is checked.

Everything else stays: optimizer states, checkpoints of a run, caches, locks, code and pickles. Where a configuration
names a folder of this machine, the copy that goes up has the name without the path.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qlora_lite.checkpoints import hub
from qlora_lite.checkpoints.base_identity import BASE_FILE
from qlora_lite.checkpoints.files import UNFINISHED, is_companion_name, is_regular, read_json
from qlora_lite.checkpoints.layouts.bitsandbytes_layout import ROWS_FILE
from qlora_lite.checkpoints.repository.download import CARD_FILE
from qlora_lite.checkpoints.repository.model_card import display_name
from qlora_lite.checkpoints.safetensors_read import TensorFiles, stored_tensors
from qlora_lite.checkpoints.safetensors_write import INDEX_FILE, SINGLE_FILE
from qlora_lite.errors import CheckpointError
from qlora_lite.export.companion_files import INDEX_SUFFIX, OF_OTHER_WEIGHTS, TEMPLATE_FOLDER
from qlora_lite.export.report import REPORT_FILE
from qlora_lite.lora.peft.describe import describe_adapter
from qlora_lite.lora.peft.keys import TENSOR_FILE
from qlora_lite.lora.peft.options import CONFIG_FILE as ADAPTER_CONFIG_FILE

ADAPTER, CHECKPOINT = "adapter", "checkpoint"
# A run's folder and its checkpoints hold these; the folder of an adapter or a checkpoint does not.
RUN_FILES = ("metrics.jsonl", "checkpoints")
RUN_CHECKPOINT_FILES = ("optimizer.safetensors", "state.json", "optimizer.pt", "trainer_state.json")
RUN_ADAPTER = "adapter"
# The entry of a file that may name a folder of this machine.
NAMING = {
    ADAPTER_CONFIG_FILE: "base_model_name_or_path",
    hub.CONFIG_FILE: "_name_or_path",
    "tokenizer_config.json": "name_or_path",
}


@dataclass(frozen=True)
class PublishedFiles:
    """What goes up. kind: adapter or checkpoint. files: by their names in the repository. left: names that stay.

    replaced: contents of files that go up in another form than they have in the folder.
    """

    folder: Path
    kind: str
    files: Mapping[str, Path]
    left: tuple[str, ...]
    replaced: Mapping[str, bytes]

    def size(self, name: str) -> int:
        """Returns the bytes of a file as it goes up."""
        changed = self.replaced.get(name)
        return self.files[name].stat().st_size if changed is None else len(changed)


def _check_is_publishable(folder: Path) -> str:
    """Returns whether a folder is an adapter or a checkpoint. Raises CheckpointError for another."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; name that of an adapter or of a checkpoint")
    names = {path.name for path in folder.iterdir()}
    if folder.name.endswith(UNFINISHED) or any(part.endswith(UNFINISHED) for part in folder.parts):
        raise CheckpointError(f"{folder} was not written to its end; write it again")
    if names & {*RUN_CHECKPOINT_FILES}:
        raise CheckpointError(f"{folder} is a checkpoint of a run, with the states of its optimizer; push an adapter")
    if names & {*RUN_FILES}:
        adapter = folder / RUN_ADAPTER
        there = f"push {adapter}" if adapter.is_dir() else "it has no adapter yet"
        raise CheckpointError(f"{folder} is the folder of a run; {there}")
    if ADAPTER_CONFIG_FILE in names:
        return ADAPTER
    if hub.CONFIG_FILE in names:
        return CHECKPOINT
    raise CheckpointError(
        f"{folder} has neither {ADAPTER_CONFIG_FILE} nor {hub.CONFIG_FILE}; name a folder that has one"
    )


def _weights(folder: Path, kind: str) -> list[str]:
    """Returns the files of weights. Raises CheckpointError if one is missing or its header damaged."""
    if kind == ADAPTER:
        describe_adapter(folder)
        return [TENSOR_FILE]
    read_json(folder / hub.CONFIG_FILE)
    found = sorted({stored.path.name for stored in TensorFiles(folder).stored.values()})
    if (folder / ROWS_FILE).is_file():
        stored_tensors(folder / ROWS_FILE)
        found.append(ROWS_FILE)
    return found if SINGLE_FILE in found else [*found, INDEX_FILE]


def _is_known(name: str, kind: str) -> bool:
    """Whether a file beside the weights belongs to an adapter or a checkpoint."""
    own = (CARD_FILE, BASE_FILE, ADAPTER_CONFIG_FILE) if kind == ADAPTER else (CARD_FILE, BASE_FILE, REPORT_FILE)
    is_companion = is_companion_name(name) and name not in OF_OTHER_WEIGHTS and not name.endswith(INDEX_SUFFIX)
    return name in own or is_companion


def _without_paths(path: Path) -> bytes | None:
    """Returns a file with the name of a folder in place of its path on this machine; None if it names none."""
    key = NAMING.get(path.name)
    if key is None:
        return None
    value = read_json(path)
    named = value.get(key)
    if not isinstance(named, str) or not (Path(named).is_absolute() or Path(named).is_dir()):
        return None
    without = {**value, key: display_name(named) or Path(named).name}
    return (json.dumps(without, indent=2, ensure_ascii=False) + "\n").encode()


def published_files(folder: Path) -> PublishedFiles:
    """Returns the files of an adapter or a checkpoint that go up.

    Raises CheckpointError for another folder, and for one whose files are missing or damaged. Reads no tensor.
    """
    kind = _check_is_publishable(folder)
    weights = _weights(folder, kind)
    templates = [path.relative_to(folder).as_posix() for path in sorted((folder / TEMPLATE_FOLDER).glob("*.jinja"))]
    known = [path.name for path in sorted(folder.iterdir()) if is_regular(path) and _is_known(path.name, kind)]
    names = [*known, *(name for name in templates if is_regular(folder / name)), *weights]
    above = {name.split("/")[0] for name in names}
    left = sorted(path.name for path in folder.iterdir() if path.name not in above)
    changed = {name: _without_paths(folder / name) for name in known}
    replaced = {name: content for name, content in changed.items() if content is not None}
    return PublishedFiles(folder, kind, {name: folder / name for name in names}, tuple(left), replaced)
