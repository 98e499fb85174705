"""Tests of model cards: what the hub's own reader finds in them, and that a user's card is never replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard as HubCard
from huggingface_hub.utils import validate_repo_id

from qlora_lite.checkpoints.repository.download import hub_id
from qlora_lite.checkpoints.repository.model_card import (
    ModelCard,
    display_name,
    inherited,
    is_own,
    rows,
    write_card,
)

CARD = ModelCard("A title", "org/base", "adapter", "peft", ["lora"], "Text.\n", {"license": ["Ä: b", "😀"]})


def test_the_hub_reads_the_front_matter(tmp_path: Path) -> None:
    write_card(tmp_path, CARD)
    read = HubCard.load(tmp_path / "README.md")
    assert read.data.to_dict() == {
        "base_model": "org/base",
        "base_model_relation": "adapter",
        "library_name": "peft",
        "tags": ["lora", "qlora-lite"],
        "license": ["Ä: b", "😀"],
    }
    assert read.text.startswith("\n# A title\n\nText.\n")
    without = HubCard(ModelCard("x", None, "adapter", "peft", [], "y").text())
    assert without.data.to_dict() == {"library_name": "peft", "tags": ["qlora-lite"]}


def test_a_card_that_the_user_wrote_or_edited_is_kept(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    for folder in (old, new):
        folder.mkdir()
    for users in (b"mine\n", CARD.text().replace("Text.", "Text of mine.").encode(), CARD.text().encode() + b"more\n"):
        (old / "README.md").write_bytes(users)
        assert not is_own(old / "README.md")
        write_card(new, CARD, replaced=old)
        write_card(old, CARD)
        assert (new / "README.md").read_bytes() == (old / "README.md").read_bytes() == users
    for ours in (CARD.text(), CARD.text().replace("\n", "\r\n")):  # as git on Windows may write it
        (old / "README.md").write_bytes(ours.encode())
        assert is_own(old / "README.md")
        write_card(new, ModelCard("Another", None, None, "peft", [], "z"), replaced=old)
        assert "# Another" in (new / "README.md").read_text()


@pytest.mark.parametrize(
    ("named", "shown"),
    [
        ("org/model", "org/model"),
        ("gpt2", "gpt2"),
        ("/home/me/.cache/huggingface/hub/models--org--model/snapshots/" + "1" * 40, "org/model"),
        ("/home/me/models/My-Model_1.5", "My-Model_1.5"),
        ("/home/me/my model", None),
        ("/", None),
        ("a/b/c", None),
        (None, None),
        ("", None),
    ],
)
def test_a_base_is_named_without_the_users_path(named: str | None, shown: str | None) -> None:
    assert display_name(named) == shown
    if shown is not None:
        validate_repo_id(shown)


def test_a_relative_folder_is_no_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("mine/tiny").mkdir(parents=True)
    assert display_name("mine/tiny") == "tiny" and display_name("yours/tiny") == "yours/tiny"
    assert hub_id(Path("mine/tiny")) is None


def test_rows_are_one_line_each() -> None:
    assert rows({"a": 12345, "b": None, "c|": 0.1234567891, "d": "x|y\nz"}).splitlines()[2:] == [
        "| a | 12,345 |",
        "| c| | 0.123457 |",
        r"| d | x\|y z |",
    ]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("---\nlicense: mit\nlanguage: [en, de]\ntags: [x]\n---\n", {"license": "mit", "language": ["en", "de"]}),
        ("---\nlicense: {a: 1}\n---\n", {}),
        ("---\n: : [\n---\n", {}),
        ("no front matter", {}),
    ],
)
def test_licence_and_language_come_from_the_base(tmp_path: Path, text: str, found: dict[str, Any]) -> None:
    assert inherited(tmp_path) == inherited(None) == {}
    (tmp_path / "README.md").write_text(text)
    assert inherited(tmp_path) == found
