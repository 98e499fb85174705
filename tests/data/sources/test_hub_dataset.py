"""Tests of data sets of the hub: a local folder stands for one, and the real `datasets` loads it."""

from __future__ import annotations

import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest

from qlora_lite.data.sources.hub_dataset import HubDataset, hub_fingerprint, hub_records, parse_hub_dataset
from qlora_lite.data.sources.raw import RawRecord
from qlora_lite.errors import CheckpointError

CALL: dict[str, Any] = {"role": "assistant", "tool_calls": [{"name": "add", "arguments": {"a": 1}}]}
OTHER_CALL: dict[str, Any] = {"role": "assistant", "tool_calls": [{"name": "say", "arguments": {"text": "b"}}]}
ROWS = [{"messages": [CALL]}, {"messages": [OTHER_CALL]}]
NAMED = HubDataset("chats", None, "train")


@pytest.fixture(autouse=True)
def local_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the data set `chats`; the caches are in it, and the network is off."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    # The tests run with the bars of the hub's client off.
    monkeypatch.setattr(sys.modules["huggingface_hub.utils.tqdm"], "HF_HUB_DISABLE_PROGRESS_BARS", None)
    shown = [datasets.utils.are_progress_bars_disabled(), huggingface_hub.utils.are_progress_bars_disabled()]
    datasets.enable_progress_bars()
    huggingface_hub.utils.enable_progress_bars()
    written(tmp_path, "train", ROWS)
    written(tmp_path, "test", ROWS[:1])
    yield tmp_path
    if shown[0]:
        datasets.disable_progress_bars()
    if shown[1]:
        huggingface_hub.utils.disable_progress_bars()


def written(folder: Path, split: str, rows: list[Any]) -> None:
    (folder / "chats").mkdir(exist_ok=True)
    (folder / "chats" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize(
    ("location", "named"),
    [
        ("org/name:train", HubDataset("org/name", None, "train")),
        ("name:train", HubDataset("name", None, "train")),
        ("org/n.a-m_e:en.v1:test", HubDataset("org/n.a-m_e", "en.v1", "test")),
        ("org/name:train[:10%]", HubDataset("org/name", None, "train[:10%]")),
        ("org/name:2024:train[10:20]", HubDataset("org/name", "2024", "train[10:20]")),
        *((text, None) for text in ("name", "org/name", "C:\\x", "C:train", "a/b/c:train", "a:b:c:d", "data.jsnl")),
        *((text, None) for text in ("/tmp/x:train", "./x:train", "https://host/x", "name:", ":train", "", "a b:train")),
    ],
)
def test_names_of_data_sets(location: str, named: HubDataset | None) -> None:
    assert parse_hub_dataset(location) == named
    assert named is None or str(named) == location


def test_rows_are_read_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = list(hub_records(NAMED))
    assert found == [RawRecord(f"chats:train, row {number + 1}", row, None) for number, row in enumerate(ROWS)]
    assert tuple(capfd.readouterr()) == ("", "")
    assert [record.value for record in hub_records(NAMED._replace(split="train[1:]"))] == ROWS[1:]
    assert [record.value for record in hub_records(NAMED._replace(config="default", split="test"))] == ROWS[:1]


def test_what_was_shown_before_is_shown_again() -> None:
    datasets.logging.set_verbosity_info()
    list(hub_records(NAMED))
    assert datasets.logging.get_verbosity() == logging.INFO
    datasets.logging.set_verbosity_warning()
    assert not datasets.utils.are_progress_bars_disabled()
    assert not huggingface_hub.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    list(hub_records(NAMED))
    assert datasets.utils.are_progress_bars_disabled()


def test_fingerprint_is_of_the_rows(local_hub: Path) -> None:
    first = hub_fingerprint(NAMED)
    assert len(first) == 64
    assert hub_fingerprint(NAMED._replace(split="test")) != first
    (local_hub / "chats" / "train.jsonl").rename(local_hub / "chats" / "train-00000-of-00001.jsonl")
    (local_hub / "chats" / "README.md").write_text("more about it")
    assert hub_fingerprint(NAMED) == first
    (local_hub / "chats" / "train-00000-of-00001.jsonl").unlink()
    written(local_hub, "train", ROWS[::-1])
    assert hub_fingerprint(NAMED) != first


@pytest.mark.parametrize(
    ("named", "why"),
    [
        (HubDataset("chats", None, "tset"), "Unknown split \"tset\". Should be one of ['train', 'test']"),
        (HubDataset("chats", "en", "train"), "BuilderConfig 'en' not found. Available: ['default']"),
        (HubDataset("org/absent", None, "train"), "Couldn't reach 'org/absent' on the Hub (OfflineModeIsEnabled)"),
    ],
)
def test_errors_of_datasets_are_one_sentence(named: HubDataset, why: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CheckpointError) as caught:
        list(hub_records(named))
    problem = f"{named} is not a file or folder, and as a data set of the hub it cannot be loaded"
    assert str(caught.value) == f"{problem}: {why}"
    assert tuple(capfd.readouterr()) == ("", "")


def test_the_cause_of_an_error_is_told(local_hub: Path) -> None:
    (local_hub / "chats" / "train.jsonl").write_text('{"text": "a"}\n{"text"')
    with pytest.raises(CheckpointError, match=r"cannot be loaded: .") as caught:
        list(hub_records(NAMED))
    assert "\n" not in str(caught.value)


def test_without_datasets_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        CheckpointError, match=r"^chats:train is not .* needs datasets .*pip install 'qlora-lite\[data\]'$"
    ):
        list(hub_records(NAMED))
