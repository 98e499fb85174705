"""Model cards: the README.md of a folder, with the YAML front matter that the hub reads.

A card ends with the SHA-256 of its text. A README.md whose text has another one was edited or comes from somebody else;
it is never replaced.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from qlora_lite.checkpoints.files import is_regular, new_file, open_regular
from qlora_lite.checkpoints.repository.download import CARD_FILE, hub_id, is_repository_name

OWN_TAG = "qlora-lite"
MARK = re.compile(r"\n<!-- written by qlora_lite; sha256 of the text above: ([0-9a-f]{64}) -->\n\Z")
LARGEST_CARD = 4 << 20
# Entries of a base's card that hold for weights made from its own.
INHERITED = ("license", "license_name", "license_link", "language", "pipeline_tag")


def display_name(name_or_path: str | None) -> str | None:
    """Returns what a card calls a base: its id on the hub, or the name of its folder without the path.

    None for a base that has neither.
    """
    if not name_or_path:
        return None
    path = Path(name_or_path)
    name = hub_id(path) or (path.resolve().name if path.is_absolute() or path.is_dir() else name_or_path)
    return name if is_repository_name(name) else None


def rows(named: Mapping[str, object]) -> str:
    """Returns a table of two columns, without the rows whose value is None."""
    lines = [f"| {name} | {_cell(value)} |" for name, value in named.items() if value is not None]
    return "\n".join(["| | |", "|---|---|", *lines])


def _cell(value: object) -> str:
    text = f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


@dataclass(frozen=True)
class ModelCard:
    """The contents of a card.

    base_model: from `display_name`. relation: of the model to it, as the hub names it: adapter, finetune or quantized.
    body: Markdown. more: further entries of the front matter.
    """

    title: str
    base_model: str | None
    relation: str | None
    library: str
    tags: Sequence[str]
    body: str
    more: Mapping[str, object] = field(default_factory=dict)

    def text(self) -> str:
        """Returns the file's text."""
        entries: dict[str, object] = {"base_model": self.base_model, "library_name": self.library}
        entries |= {"base_model_relation": None if self.base_model is None else self.relation}
        entries |= {"tags": [*self.tags, OWN_TAG], **self.more}
        known = {key: value for key, value in entries.items() if value is not None}
        # JSON is YAML, but for characters beyond 16 bits, which are written as they are.
        front = "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in known.items())
        text = f"---\n{front}\n---\n\n# {self.title}\n\n{self.body.strip()}\n"
        return f"{text}\n<!-- written by qlora_lite; sha256 of the text above: {_sum(text)} -->\n"


def _sum(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def is_own(path: Path) -> bool:
    """Whether a card was written here and not edited since."""
    text = _content(path).decode(errors="replace").replace("\r\n", "\n")
    found = MARK.search(text)
    return found is not None and _sum(text[: found.start()]) == found[1]


def _content(path: Path) -> bytes:
    with open_regular(path, "a model card", LARGEST_CARD) as file:
        return file.read()


def write_card(target: Path, card: ModelCard, replaced: Path | None = None) -> None:
    """Writes the README.md of a folder, unless the user wrote or edited the one that is there.

    replaced: the folder that `target` will replace, whose README.md is kept if it is the user's.
    """
    present = (target if replaced is None else replaced) / CARD_FILE
    kept = _content(present) if is_regular(present) and not is_own(present) else None
    if kept is None or replaced is not None:
        with new_file(target / CARD_FILE, overwrite=True) as file:
            file.write(card.text().encode() if kept is None else kept)


def inherited(base: Path | None) -> dict[str, object]:
    """Returns the entries of the front matter of a base's README.md that hold for weights made from its own."""
    if base is None or not is_regular(base / CARD_FILE):
        return {}
    from huggingface_hub.repocard import metadata_load

    try:
        found = metadata_load(base / CARD_FILE) or {}
    except Exception:  # whatever a YAML parser raises; the card is not ours to judge
        return {}
    return {key: found[key] for key in INHERITED if isinstance(found.get(key), (str, list))}
