"""Tests of fetching checkpoints, by the real client of the hub from a stand-in that notes what it is asked for."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lite.checkpoints.hub import checkpoint_folder, load_tokenizer, model_folder
from qlora_lite.checkpoints.load import load_quantized
from qlora_lite.checkpoints.repository.download import cached_checkpoint, download_checkpoint, is_repository_name
from qlora_lite.errors import CheckpointError, Stopped
from qlora_lite.quantization.config import QuantConfig
from qlora_lite.signals import deferred_signals

INDEX = "model.safetensors.index.json"
# What repositories hold besides the files of a checkpoint.
TWINS = (
    *("consolidated.safetensors", "consolidated.00.pth", "original/model.safetensors", "original/params.json"),
    *(
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "model-00009-of-00009.safetensors",
        "model.fp16.safetensors",
    ),
    *(
        "model.Q4_K_M.gguf",
        "onnx/model.onnx",
        "tf_model.h5",
        "flax_model.msgpack",
        "original/README.md",
        "modeling_x.py",
    ),
    *("figures/one.png", ".gitattributes", "metal/model.bin", "consolidated.safetensors.index.json"),
)
SMALL = (
    "LICENSE",
    "README.md",
    "additional_chat_templates/tools.jinja",
    "preprocessor_config.json",
    "chat_template.jinja",
)


def repository(import_script: Any, files: dict[str, bytes], **settings: Any) -> Any:
    return import_script("tests/stand_in_hub.py").Repository(files, **settings)


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def sharded(folder: Path) -> dict[str, bytes]:
    """The files of a checkpoint folder, with its tensors in two shards."""
    from safetensors.torch import load, save

    files = files_of(folder)
    tensors = load(files.pop("model.safetensors"))
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    files |= {shard: save({name: tensors[name] for name in held}) for shard, held in shards.items()}
    weight_map = {name: shard for shard, held in shards.items() for name in held}
    return files | {INDEX: json.dumps({"metadata": {}, "weight_map": weight_map}).encode()}


@pytest.fixture
def published(stand_in_hub: Any, import_script: Any, tiny_folder: Path) -> Any:
    """The stand-in with a checkpoint in shards, `org/sharded`, and one in one file, `org/single`, amid their twins."""
    twins = {name: json.dumps({"of": name}).encode() for name in (*TWINS, *SMALL)}
    stand_in_hub.repositories["org/sharded"] = repository(import_script, {**sharded(tiny_folder), **twins})
    stand_in_hub.repositories["org/single"] = repository(import_script, {**files_of(tiny_folder), **twins})
    return stand_in_hub


@pytest.mark.parametrize("name", ["org/sharded", "org/single"])
def test_only_the_files_that_are_read_are_fetched_and_once(published: Any, tiny_folder: Path, name: str) -> None:
    wanted = {*published.repositories[name].files} - {*TWINS}
    folder = checkpoint_folder(name)
    assert published.fetched() == sorted(wanted)
    assert {*SMALL, "config.json", "tokenizer.json"} <= wanted  # companions are among them
    asked = len(published.requests)
    assert checkpoint_folder(name) == folder
    assert published.requests[asked:] == [f"GET /api/models/{name}"]  # whether there is a newer revision
    ours, local = load_quantized(name, QuantConfig("none")), load_quantized(tiny_folder, QuantConfig("none"))
    tensors = local.state_dict()
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in ours.state_dict().items())
    assert model_folder(ours) == folder


def test_a_tokenizer_needs_no_weights(published: Any) -> None:
    assert load_tokenizer("org/sharded").pad_token_id is not None
    assert not [name for name in published.fetched() if name.endswith(".safetensors")]
    checkpoint_folder("org/sharded")
    assert len(published.fetched()) == len(set(published.fetched()))
    assert len([name for name in published.fetched() if name.endswith(".safetensors")]) == 2


def test_a_broken_connection_goes_on_where_it_broke(published: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    shard = "model-00002-of-00002.safetensors"
    whole = published.repositories["org/sharded"].files[shard]
    published.broken[shard] = 1000
    folder = checkpoint_folder("org/sharded")
    assert (folder / shard).read_bytes() == whole
    assert published.fetched().count(shard) == 2


def test_a_download_that_ended_early_goes_on_with_the_next_file(
    published: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "1")
    published.refused["model-00002"] = (500, "")
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(CheckpointError, match=r"^org/sharded is not a .* answered 500, .*; try again later$"):
        checkpoint_folder("org/sharded")
    assert cached_checkpoint("org/sharded") is not None
    published.refused.clear()
    published.requests.clear()
    checkpoint_folder("org/sharded")
    assert published.fetched() == ["model-00002-of-00002.safetensors"]


def test_a_signal_ends_a_download(published: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetched(*_: object) -> Path:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("went on")

    monkeypatch.setattr("qlora_lite.checkpoints.repository.download._fetch", fetched)
    with pytest.raises(Stopped, match=r"^stopped by SIGTERM; nothing is left half-written$"), deferred_signals():
        checkpoint_folder("org/single")


def test_what_was_fetched_is_found_without_a_network(published: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    folder = checkpoint_folder("org/sharded")
    published.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert checkpoint_folder("org/sharded") == folder
    assert not published.requests
    shard = folder / "model-00002-of-00002.safetensors"
    shard.unlink()
    with pytest.raises(
        CheckpointError, match=r"cannot be fetched: HF_HUB_OFFLINE is set, and keeps the client off the net"
    ):
        checkpoint_folder("org/sharded")
    assert checkpoint_folder("org/sharded", weights=False) == folder


@pytest.mark.parametrize(
    ("files", "sentence"),
    [
        (["README.md"], r"^org/bad has no config\.json; name another one$"),
        (
            ["adapter_config.json"],
            r"^org/bad has no config\.json; it is an adapter: name its base, and the adapter apart",
        ),
        (
            ["config.json", "pytorch_model.bin"],
            r"^org/bad has neither .*; it has pytorch_model\.bin: pickles .*from_pretrained\('org/bad'\).*refs/pr/1",
        ),
        (["config.json", "m.gguf"], r"^org/bad has neither model\.safetensors nor model.*json; it has m\.gguf$"),
    ],
)
def test_a_repository_that_cannot_be_read_is_not_fetched(
    stand_in_hub: Any, import_script: Any, files: list[str], sentence: str
) -> None:
    stand_in_hub.repositories["org/bad"] = repository(import_script, dict.fromkeys(files, b"{}"))
    with pytest.raises(CheckpointError, match=sentence):
        checkpoint_folder("org/bad")
    assert not stand_in_hub.fetched()


def test_an_index_that_names_files_that_are_not_there(stand_in_hub: Any, import_script: Any) -> None:
    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}).encode()
    files = {"config.json": b"{}", INDEX: index, "model-1.safetensors": b""}
    stand_in_hub.repositories["org/bad"] = repository(import_script, files)
    with pytest.raises(CheckpointError, match=r"index of org/bad names files .* lacks: model-2\.safetensors$"):
        download_checkpoint("org/bad")
    assert "model-1.safetensors" not in stand_in_hub.fetched()
    stand_in_hub.repositories["org/bad"].files[INDEX] = b'{"weight_map": []}'
    stand_in_hub.repositories["org/bad"].commit = "2" * 40
    with pytest.raises(CheckpointError, match=r"model\.safetensors\.index\.json has no weight_map$"):
        download_checkpoint("org/bad")


def test_refusals_are_one_sentence(
    published: Any, import_script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = published.address.replace(".", r"\.")
    for name, sentence in {
        "org/shraded": rf": {address} has no such repository, or it is private; check the spelling, or log in with",
        "org/hidden": rf": {address} has no such repository, or it is private; check",
        "a--b/c": r": this is not the name of a repository, which is owner/name$",
    }.items():
        published.repositories["org/hidden"] = repository(import_script, {}, private=True)
        with pytest.raises(CheckpointError, match=rf"^{name} is not a local folder and cannot be fetched{sentence}"):
            checkpoint_folder(name)
    (tmp_path / "shraded").mkdir()
    (tmp_path / "shraded" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"^sharded is not a local folder \(did you mean shraded\?\) and cannot"):
        checkpoint_folder("sharded")
    published.refused["/api/models/org/single"] = (403, "GatedRepo")
    with pytest.raises(CheckpointError, match=rf": it is gated; ask for access on its page at {address}, and log in"):
        checkpoint_folder("org/single")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(CheckpointError, match=r"answered 401, Invalid credentials .*token is missing or was refused"):
        checkpoint_folder("org/sharded")


def test_a_hub_that_does_not_answer_is_one_sentence(stand_in_hub: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    sentence = (
        r"^org/x is not a local folder and cannot be fetched: http://127\.0\.0\.1:9 cannot be reached \([^\n]+\)$"
    )
    with pytest.raises(CheckpointError, match=sentence):
        checkpoint_folder("org/x")


@pytest.mark.parametrize(
    "name",
    [
        *("org/model", "gpt2", "org/my-model_1.5", "a/b", "a", "org/model.v2", "x" * 96),
        *("org/a--b", "org/..", "org/x.git", "a/b/c", "org/", "/x", "", "org/a b", "-x", "org/x-", "org/x.", "x" * 97),
    ],
)
def test_names_of_repositories_are_those_that_the_client_takes(name: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except HFValidationError:
        assert not is_repository_name(name)
    else:
        assert is_repository_name(name)
