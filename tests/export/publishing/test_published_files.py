"""Tests of which files of a folder go up to the hub, and which folders are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_quantized, save_adapter
from qlora_lite.errors import CheckpointError
from qlora_lite.export.publishing.published_files import published_files
from qlora_lite.export.quantized import save_quantized

ADAPTER_FILES = {"README.md", "adapter_config.json", "adapter_model.safetensors", "qlora_lite_base.json"}
FOREIGN = ("notes.txt", "optimizer.bin", "training_args.bin", "x.py", ".lock", "events.out", "rng.pth", "a.partial")


@pytest.fixture(scope="module")
def adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = load_quantized(tiny_folder)
    add_lora_(model, LoraConfig(rank=2, target_modules=["q_proj"]))
    save_adapter(model, folder)
    return folder


def test_an_adapter_goes_up_without_what_lies_beside_it(adapter: Path, tiny_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "a"
    shutil.copytree(adapter, folder)
    shutil.copy(tiny_folder / "tokenizer.json", folder)
    for name in FOREIGN:
        (folder / name).write_text("x")
    (folder / ".cache" / "huggingface").mkdir(parents=True)
    (folder / "link.json").symlink_to("/dev/zero")
    found = published_files(folder)
    assert (found.kind, {*found.files}) == ("adapter", ADAPTER_FILES | {"tokenizer.json"})
    assert {*found.left} == {*FOREIGN, ".cache", "link.json"}
    said = json.loads(found.replaced["adapter_config.json"])
    assert said.pop("base_model_name_or_path") == tiny_folder.name
    original = json.loads((folder / "adapter_config.json").read_text())
    assert original.pop("base_model_name_or_path") == str(tiny_folder) and said == original
    assert found.size("adapter_config.json") == len(found.replaced["adapter_config.json"])
    assert str(tiny_folder.parent).encode() not in b"".join(
        found.replaced.get(name, path.read_bytes()) for name, path in found.files.items()
    )


def test_a_packed_checkpoint_goes_up_with_all_its_files(tiny_folder: Path, tmp_path: Path) -> None:
    save_quantized(
        load_quantized(tiny_folder, QuantConfig("nf4", embedding_format="int8")), tmp_path, max_shard_bytes=20_000
    )
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tools.jinja").write_text("x")
    (tmp_path / "model-00099-of-00099.safetensors").write_bytes(b"")  # not in the index
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    found = published_files(tmp_path)
    assert found.kind == "checkpoint" and found.left == ("model-00099-of-00099.safetensors",)
    assert {*found.files} == written - {*found.left}
    assert {"int8_rows/absmax.safetensors", "model.safetensors.index.json", "tokenizer.json"} <= {*found.files}


def no_weights(folder: Path) -> None:
    (folder / "adapter_model.safetensors").unlink()


def half_of_the_weights(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-8])


def no_configuration(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def a_run(folder: Path) -> None:
    for path in [*folder.iterdir()]:
        (folder / "adapter").mkdir(exist_ok=True)
        path.rename(folder / "adapter" / path.name)
    (folder / "metrics.jsonl").write_text("")


def a_checkpoint_of_a_run(folder: Path) -> None:
    (folder / "optimizer.safetensors").write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (no_weights, r"adapter_model\.safetensors does not exist"),
        (half_of_the_weights, r"adapter_model\.safetensors is not a readable safetensors file"),
        (no_configuration, r"a has neither adapter_config\.json nor config\.json; name a folder that has one$"),
        (a_run, r"a is the folder of a run; push \S+a/adapter$"),
        (a_checkpoint_of_a_run, r"a is a checkpoint of a run, with the states of its optimizer; push an adapter$"),
        (shutil.rmtree, r"a is not a folder; name that of an adapter or of a checkpoint$"),
    ],
)
def test_other_folders_are_refused(
    adapter: Path, tmp_path: Path, spoil: Callable[[Any], object], sentence: str
) -> None:
    shutil.copytree(adapter, tmp_path / "a")
    spoil(tmp_path / "a")
    with pytest.raises(CheckpointError, match=sentence):
        published_files(tmp_path / "a")


def test_a_folder_that_was_not_written_to_its_end_is_refused(adapter: Path, tmp_path: Path) -> None:
    shutil.copytree(adapter, tmp_path / ".a.12345678.partial" / "new")
    with pytest.raises(CheckpointError, match=r"was not written to its end; write it again$"):
        published_files(tmp_path / ".a.12345678.partial" / "new")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir()
    with pytest.raises(CheckpointError, match=r"run is the folder of a run; it has no adapter yet$"):
        published_files(tmp_path / "run")
