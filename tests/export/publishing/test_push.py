"""Tests of uploads by the real client of the hub to a stand-in that stores what it gets."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from qlora_lite import LoraConfig, QuantConfig, add_lora_, load_adapter_, load_quantized, save_adapter
from qlora_lite.errors import CheckpointError, ConfigError
from qlora_lite.export import push_to_hub
from qlora_lite.export.quantized import save_quantized

NAME = "me/mine"


@pytest.fixture(scope="module")
def adapter(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    model = load_quantized(tiny_folder)
    add_lora_(model, LoraConfig(rank=2, target_modules=["q_proj"]))
    save_adapter(model, folder)
    return folder


@pytest.fixture
def hub(stand_in_hub: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The stand-in, and a token that it takes."""
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    return stand_in_hub


def test_an_adapter_goes_up_in_one_commit(hub: Any, adapter: Path, tiny_folder: Path, tmp_path: Path) -> None:
    done = push_to_hub(adapter, NAME, private=True)
    there = hub.repositories[NAME]
    assert there.private and {*there.files} == {*done.files} == {path.name for path in adapter.iterdir()}
    changed = "adapter_config.json"
    assert all(there.files[name] == (adapter / name).read_bytes() for name in done.files if name != changed)
    assert json.loads(there.files[changed])["base_model_name_or_path"] == tiny_folder.name
    assert (done.address, done.commit, done.kind) == (f"{hub.address}/{NAME}", there.commit, "adapter")
    assert done.bytes == sum(map(len, there.files.values()))
    assert len([request for request in hub.requests if "/commit/" in request]) == 1
    again = tmp_path / "again"
    again.mkdir()
    for name, content in there.files.items():
        (again / name).write_bytes(content)
    assert load_adapter_(load_quantized(tiny_folder), again)


def test_a_packed_checkpoint_comes_back_from_there(hub: Any, tiny_folder: Path, tmp_path: Path) -> None:
    packed = load_quantized(tiny_folder, QuantConfig("nf4"))
    save_quantized(packed, tmp_path / "packed", max_shard_bytes=40_000)
    done = push_to_hub(tmp_path / "packed", NAME)
    assert done.kind == "checkpoint" and not hub.repositories[NAME].private
    back, given = load_quantized(NAME).state_dict(), packed.state_dict()
    assert given.keys() == back.keys() and all(torch.equal(tensor, back[name]) for name, tensor in given.items())
    save_quantized(packed, tmp_path / "one")
    removed = push_to_hub(tmp_path / "one", NAME).removed
    assert "model.safetensors.index.json" in removed and len(removed) > 2
    held = [name for name in hub.repositories[NAME].files if "safetensors" in name]
    assert held == ["model.safetensors"]  # no reader takes the earlier shards for these


def test_a_branch_leaves_the_main_one_as_it_is(hub: Any, adapter: Path) -> None:
    done = push_to_hub(adapter, "mine", revision="trial")
    there = hub.repositories[NAME]
    assert done.repository == NAME and done.revision == "trial"
    assert not there.files and {*there.branches["trial"]} == {*done.files}


def test_a_card_that_was_edited_there_is_kept(hub: Any, adapter: Path, tmp_path: Path) -> None:
    push_to_hub(adapter, NAME)
    there = hub.repositories[NAME]
    first = there.files["README.md"]
    assert push_to_hub(adapter, NAME).kept == ()  # ours is replaced by ours
    there.files["README.md"], there.commit = first + b"edited", "3" * 40
    assert push_to_hub(adapter, NAME).kept == ("README.md",)
    assert there.files["README.md"] == first + b"edited"
    shutil.copytree(adapter, tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("mine")
    push_to_hub(tmp_path / "a", NAME)
    assert there.files["README.md"] == b"mine"


def test_what_the_hub_refuses_is_one_sentence(hub: Any, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(name: str, sentence: str, **settings: Any) -> None:
        before = {name: dict(there.files) for name, there in hub.repositories.items()}
        with pytest.raises(CheckpointError, match=rf"^{sentence}") as caught:
            push_to_hub(adapter, name, **settings)
        assert "\n" not in str(caught.value)
        assert before == {name: dict(there.files) for name, there in hub.repositories.items()}

    start = rf"{adapter} cannot be pushed to \S+: "
    push_to_hub(adapter, "me/public")
    hub.repositories["other/theirs"] = type(hub.repositories["me/public"])({})
    refused("other/theirs", start + r".* answered 403, you are not allowed to write here; the token does not allow")
    refused("other/new", start + r".* answered 403, You don't have the rights .*the token does not allow this: use")
    refused("me/public", start + r".* answered 401, .*: log in", token="hf_wrong")
    refused("me/public", r"me/public exists and is public, and private \(--private\) was asked for", private=True)
    hub.repositories["me/public"].files = {"config.json": b"{}"}
    refused("me/public", "me/public holds a checkpoint, and readers would take one for the other; name another")
    hub.refused["/lfs/"] = (403, "")
    hub.repositories["me/public"].files = {}
    refused("me/public", start + ".* answered 403")
    monkeypatch.delenv("HF_TOKEN")
    refused("me/public", start + "there is no token; log in with `hf auth login`, or set HF_TOKEN$")
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    refused("me/public", start + r"http://127\.0\.0\.1:9 cannot be reached")


def test_names_that_cannot_be_are_refused_first(hub: Any, tmp_path: Path) -> None:
    for name in ("a--b/c", "a/b/c", "me/", "", "me/x y", "me/\n"):
        with pytest.raises(ConfigError, match=r"^the repository must be owner/name, of letters, .*; got '[^\n]*'$"):
            push_to_hub(tmp_path, name)
    for name in ("a b", "a..b", "-x", "a/", "x.lock", "", "a\n", "x" * 300):
        with pytest.raises(ConfigError, match=r"^the revision must be the name of a branch; got '"):
            push_to_hub(tmp_path, NAME, revision=name)
    assert not hub.requests
