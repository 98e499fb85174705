"""Tests of folders: the data files in order, everything else left out, and several splits refused by name."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest

from qlora_lite.data.sources.folder import data_files
from qlora_lite.errors import CheckpointError


def folder_of(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")
    return folder


def found(folder: Path, split: str | None = None) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in data_files(folder, split)]


def test_data_files_in_order(tmp_path: Path) -> None:
    data = ["B.JSONL", "a.csv.gz", "a.jsonl", "b/a.parquet", "b/c/a.tsv", "b.json.zst", "c.arrow", "c.ndjson"]
    others = [
        "README.md",
        "notes.md",
        "LICENSE",
        "README.json",
        "license.txt",
        "a.py",
        "dataset_info.json",
        "state.json",
    ]
    hidden = [".a.jsonl", "_SUCCESS", "_a.jsonl", ".cache/a.jsonl", "b/_old/a.jsonl", "cache-0123abcdef.arrow"]
    assert found(folder_of(tmp_path, *data, *others, *hidden)) == [
        *("B.JSONL", "a.csv.gz", "a.jsonl", "b/a.parquet", "b/c/a.tsv", "b.json.zst", "c.arrow", "c.ndjson")
    ]


@pytest.mark.parametrize(
    ("names", "splits"),
    [
        (["train.jsonl", "test.jsonl"], "train, test"),
        (["train/a.jsonl", "validation/a.jsonl", "test/a.jsonl"], "train, test, validation"),
        (["data/train-00000-of-00001.parquet", "data/dev-00000-of-00001.parquet"], "train, dev"),
        (["data/train_sft-00000-of-00001.parquet", "data/train_gen-00000-of-00001.parquet"], "train_gen, train_sft"),
        (["my_train_data.csv", "my-eval-data.csv"], "train, test"),
        (["a.jsonl", "test.jsonl"], "files without a split in their names, test"),
        (["val.jsonl", "test.jsonl"], "test, validation"),
    ],
)
def test_several_splits_are_refused(tmp_path: Path, names: list[str], splits: str) -> None:
    folder_of(tmp_path, *names)
    with pytest.raises(CheckpointError) as caught:
        data_files(tmp_path)
    named = next(split for split in splits.split(", ") if " " not in split)
    assert str(caught.value) == (
        f"{tmp_path} holds several splits: {splits}; name one of them, as {tmp_path}:{named}, or its files"
    )
    assert len(found(tmp_path, named)) == 1


@pytest.mark.parametrize(
    "names",
    [
        ["train.jsonl"],
        ["test.jsonl"],
        ["train.jsonl", "training/more.jsonl", "a.jsonl"],
        ["contest.jsonl", "latest.jsonl", "trainer.jsonl", "devices.jsonl", "a.jsonl"],
        ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"],
        ["math/train.jsonl", "code/train.jsonl"],
    ],
)
def test_one_split_is_read(tmp_path: Path, names: list[str]) -> None:
    assert found(folder_of(tmp_path, *names)) == sorted(names)


def test_a_split_is_chosen_by_name(tmp_path: Path) -> None:
    folder_of(tmp_path, "train.jsonl", "more/train.csv", "valid.jsonl", "a.jsonl")
    assert found(tmp_path, "train") == ["more/train.csv", "train.jsonl"]
    assert found(tmp_path, "validation") == ["valid.jsonl"]
    with pytest.raises(
        CheckpointError, match=r"has no split 'test'; it has train, files without a split in .*validation"
    ):
        data_files(tmp_path, "test")


def test_what_datasets_saves(tmp_path: Path) -> None:
    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_list([{"a": 1}, {"a": 2}])
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    assert found(tmp_path / "one") == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    datasets.DatasetDict(math=rows, code=rows).save_to_disk(tmp_path / "two")
    with pytest.raises(CheckpointError, match=r"holds several splits: code, math; name one of them, as .*two:code, or"):
        data_files(tmp_path / "two")
    assert found(tmp_path / "two", "math") == ["math/data-00000-of-00001.arrow"]
    assert found(tmp_path / "two" / "code") == ["data-00000-of-00001.arrow"]
    datasets.DatasetDict(math=rows).save_to_disk(tmp_path / "alone")
    assert found(tmp_path / "alone") == ["math/data-00000-of-00001.arrow"]


def test_missing_shards_are_listed(tmp_path: Path) -> None:
    folder_of(tmp_path, "data/train-00001-of-00004-ab12.parquet", "data/train-00003-of-00004-cd34.parquet")
    with pytest.raises(CheckpointError) as caught:
        data_files(tmp_path)
    missing = "data/train-00000-of-00004, data/train-00002-of-00004"
    assert str(caught.value) == f"{tmp_path} lacks {missing}; copy them, or name the files that are to be read"


def test_a_folder_without_data_lists_what_it_holds(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no data file; it holds nothing; data files are named \*\.jsonl, "):
        data_files(tmp_path)
    folder_of(tmp_path, "model.safetensors", "sub/a.txt", "README.md")
    with pytest.raises(CheckpointError, match=r"has no data file; it holds README\.md, model\.safetensors, sub; data"):
        data_files(tmp_path)


def test_data_that_cannot_be_read_is_not_left_out(tmp_path: Path) -> None:
    folder_of(tmp_path, "a.jsonl", "b.jsonl.xz", "sub/c.ZIP")
    with pytest.raises(CheckpointError, match=r"holds files that cannot be read: b\.jsonl\.xz, sub/c\.ZIP; unpack or"):
        data_files(tmp_path)
