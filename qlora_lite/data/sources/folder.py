"""The data files of a folder, in reading order, if they are of one split.

Names say which files hold data, and which split they belong to: `train.jsonl`, `train/a.parquet`,
`data/train-00000-of-00002.parquet`, or the folders that DatasetDict.save_to_disk writes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from qlora_lite.checkpoints.files import read_json, reason
from qlora_lite.data.sources.data_file import TABLE_SUFFIXES, text_suffix
from qlora_lite.data.sources.delimited import DELIMITERS
from qlora_lite.errors import CheckpointError, listing

DATA_SUFFIXES = (".jsonl", ".ndjson", ".json", *DELIMITERS, *TABLE_SUFFIXES)
DESCRIPTIONS = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
CACHED = re.compile(r"cache-[0-9a-f]+.*\.arrow")  # by `datasets`, beside the data that it was made from
# They may hold data, and leaving them out would go unnoticed.
UNREADABLE_SUFFIXES = (".zip", ".xz", ".bz2", ".lz4", ".7z", ".rar", ".tar", ".tgz", ".xlsx", ".xls", ".orc", ".avro")

# As `datasets` finds splits: these words in the path, between separators.
SPLIT_OF_WORD = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
SPLIT_WORD = re.compile(rf"(?<![^-._ /0-9])({'|'.join(SPLIT_OF_WORD)})(?![^-._ /0-9])", re.IGNORECASE)
SHARD = re.compile(r"(?P<name>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\b.*")
NO_SPLIT = ""


def data_files(folder: Path, split: str | None = None) -> list[Path]:
    """Returns the data files of a folder and of the folders in it, sorted by their names.

    split: the split whose files are returned. Without it, CheckpointError is raised for a folder that holds several,
    as for one without a data file, with a file of a kind that cannot be read, or with missing shards.
    """
    names = _names(folder)
    if unreadable := [name for name in names if name.lower().endswith(UNREADABLE_SUFFIXES)]:
        raise CheckpointError(f"{folder} holds files that cannot be read: {listing(unreadable)}; unpack or remove them")
    found = [name for name in names if _is_data(name)]
    if not found:
        held = listing(sorted(os.listdir(folder))) or "nothing"
        raise CheckpointError(
            f"{folder} has no data file; it holds {held}; data files are named *{', *'.join(DATA_SUFFIXES)}"
        )
    saved = _saved_splits(folder)
    splits: dict[str, list[str]] = {}
    for name in found:
        splits.setdefault(_split_of(name, saved), []).append(name)
    if split is not None and split not in splits:
        raise CheckpointError(f"{folder} has no split {split!r}; it has {_listed(splits)}")
    if split is None and _are_several(splits):
        first = next(name for name in sorted(splits, key=_training_first) if name)
        advice = f"name one of them, as {str(folder).rstrip('/')}:{first}, or its files"
        raise CheckpointError(f"{folder} holds several splits: {_listed(splits)}; {advice}")
    chosen = found if split is None else splits[split]
    _check_shards(folder, chosen)
    return [folder / name for name in chosen]


def _names(folder: Path) -> list[str]:
    """The files below a folder as paths from it, sorted; without those whose path has a hidden or private part."""
    names = []
    for place, folders, files in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith((".", "_"))]
        parts = Path(place).relative_to(folder)
        names += [(parts / name).as_posix() for name in files if not name.startswith((".", "_"))]
    return sorted(names, key=lambda name: name.split("/"))


def _raise(error: OSError) -> None:
    raise CheckpointError(f"cannot read the folder {error.filename}: {reason(error)}") from error


def _is_data(name: str) -> bool:
    path = Path(name)
    left_out = path.name in DESCRIPTIONS or CACHED.fullmatch(path.name) or path.name.startswith(("README", "LICENSE"))
    return not left_out and text_suffix(path) in DATA_SUFFIXES


def _saved_splits(folder: Path) -> list[str]:
    """The splits that DatasetDict.save_to_disk wrote, each into a folder of its own."""
    listed = folder / "dataset_dict.json"
    splits = read_json(listed).get("splits", []) if listed.is_file() else []
    return [split for split in splits if isinstance(split, str)] if isinstance(splits, list) else []


def _split_of(name: str, saved: list[str]) -> str:
    """The split that a file belongs to; empty if its name does not say."""
    top = name.partition("/")[0]
    if top in saved:
        return top
    words: list[str] = SPLIT_WORD.findall(name)
    if not words:
        return NO_SPLIT
    shard = SHARD.fullmatch(name.rpartition("/")[2])
    return shard["name"] if shard and SPLIT_WORD.search(shard["name"]) else SPLIT_OF_WORD[words[-1].lower()]


def _are_several(splits: Iterable[str]) -> bool:
    """Whether files would be mixed that were kept apart. Files without a split may stand beside those to train on."""
    named = set(splits) - {NO_SPLIT}
    return len(named) > 1 or (NO_SPLIT in splits and bool(named - {"train"}))


def _training_first(split: str) -> tuple[bool, str]:
    return not split.startswith("train"), split


def _listed(splits: Iterable[str]) -> str:
    return listing(split or "files without a split in their names" for split in sorted(splits, key=_training_first))


def _check_shards(folder: Path, names: list[str]) -> None:
    """Raises CheckpointError if a file is one of several and others of them are missing."""
    numbers: dict[tuple[str, str], set[int]] = {}
    for name in names:
        if shard := SHARD.fullmatch(name):
            numbers.setdefault((shard["name"], shard["count"]), set()).add(int(shard["number"]))
    missing = [
        f"{name}-{number:05d}-of-{count}"
        for (name, count), found in numbers.items()
        for number in range(int(count))
        if number not in found
    ]
    if missing:
        raise CheckpointError(f"{folder} lacks {listing(missing)}; copy them, or name the files that are to be read")
