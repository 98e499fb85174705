"""README and docs: every Python block runs, every command parses, every file, option and link that is named exists."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from PIL import Image

from qlora_lite.cli.main import app

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```([\w{}-]*)\n(.*?)^```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`([^`\n]+)`")
MODEL, VISION_MODEL = "path/to/model", "path/to/vision-model"
# Options of other programs that pages name.
FOREIGN_OPTIONS = {"--multi_gpu", "--cpu"}
FEW_STEPS = "3"
# Commands that take long even on a tiny model, need a network, or wait for a person; they are parsed only.
SLOW = {"init", "plan", "profile", "push", "chat", "generate", "serve"}

GROUP: Any = typer.main.get_command(app)
COMMANDS: dict[str, Any] = GROUP.commands


class Block(NamedTuple):
    """A fenced block of a page: its language, its text, and the line it starts on."""

    language: str
    text: str
    line: int


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(found[1], found[2], text.count("\n", 0, found.start()) + 1) for found in FENCE.finditer(text)]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def commands(block: Block) -> Iterator[list[str]]:
    """The words of each command of a console block: lines that begin with a prompt, and those that continue them."""
    joined = block.text.replace("\\\n", " ")
    yield from (shlex.split(line[2:], comments=True) for line in joined.splitlines() if line.startswith("$ "))


def with_few_steps(words: list[str]) -> list[str]:
    """The same command, but training for a few steps only."""
    return [FEW_STEPS if before == "--steps" else word for before, word in zip(["", *words], words, strict=False)]


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
        from tiny_model import make_tiny_model
    return with_bytes(make_tiny_model(tmp_path_factory.mktemp("model")))


def with_bytes(folder: Path) -> Path:
    """Gives a checkpoint's tokenizer the form of GPT-2's, with the same ids: GGUF files have no words by number."""
    from tokenizers import pre_tokenizers

    splitter = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    parts = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    special = {token["content"] for token in parts["added_tokens"]}
    spelled = {
        token if token in special else splitter.pre_tokenize_str(token)[0][0]: number
        for token, number in parts["model"]["vocab"].items()
    }
    parts["model"] = {"type": "BPE", "vocab": spelled, "merges": [], "unk_token": "<unk>"}
    parts["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    parts["decoder"] = parts["pre_tokenizer"]
    (folder / "tokenizer.json").write_text(json.dumps(parts), encoding="utf-8")
    return folder


@pytest.fixture
def workplace(memory_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> Path:
    """A folder with the files that pages name: a model, training data and held-out data."""
    monkeypatch.chdir(memory_path)
    monkeypatch.setenv("QLORA_LITE_CACHE", str(memory_path / "cache"))
    monkeypatch.setattr(sys, "path", [str(ROOT / "examples"), *sys.path])
    shutil.copytree(tiny_model, memory_path / MODEL)
    lines = [{"prompt": f"what is {n}", "completion": f"it is {n}"} for n in range(12)]
    for file, some in (("data.jsonl", lines[:8]), ("heldout.jsonl", lines[8:])):
        (memory_path / file).write_text("\n".join(map(json.dumps, some)), encoding="utf-8")
    return memory_path


def write_pictures(folder: Path) -> None:
    """Pictures, and records about them."""
    folder.mkdir()
    lines = []
    for number in range(4):
        Image.new("RGB", (30, 30), (60 * number, 0, 0)).save(folder / f"{number}.png")
        content = [{"type": "image", "path": f"{number}.png"}, {"type": "text", "text": "?"}]
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": str(number)}]
        lines.append(json.dumps({"messages": messages}))
    (folder / "records.jsonl").write_text("\n".join(lines), encoding="utf-8")


def has_configuration(words: list[str]) -> bool:
    """Whether the command is followed by a configuration file, or by the folder of a run."""
    return words[1] == "train" and not words[2].startswith("-")


def run_command(words: list[str]) -> None:
    """Runs a command on the tiny model in this process; it must end well."""
    status = app(with_few_steps(words[1:]), standalone_mode=False, prog_name=words[0])
    assert status in (None, 0), words


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_of_a_page_run_in_order(page: Path, workplace: Path, tiny_vision_folder: Path) -> None:
    """Python blocks share one namespace. Commands run if they are quick and about what the folder has."""
    if VISION_MODEL in page.read_text(encoding="utf-8"):
        shutil.copytree(tiny_vision_folder, workplace / VISION_MODEL)
        write_pictures(workplace / "pictures")
    names: dict[str, object] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.language == "python":
            source = "\n" * block.line + block.text  # so that a traceback has the line of the page
            exec(compile(source, name_of(page), "exec"), names)
        elif block.language == "console":
            for words in commands(block):
                is_ready = words[1] != "train" or {MODEL, VISION_MODEL} & {*words} or has_configuration(words)
                if words[0] == "qlora-lite" and words[1] not in SLOW and is_ready:
                    run_command(words)
        elif block.language == "json":
            for line in block.text.splitlines():
                json.loads(line)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_of_a_page_parse(page: Path) -> None:
    for block in blocks(page):
        for words in commands(block) if block.language == "console" else ():
            if words[0] == "qlora-lite":
                # A configuration is a file that the page makes before.
                COMMANDS[words[1]].make_context(words[1], words[2:], resilient_parsing=has_configuration(words))
            elif words[0] == "python":
                assert (ROOT / words[1]).is_file(), words
            else:
                assert Path(words[0]).name in ("make", "ollama", "pip", "pre-commit", "torchrun", ""), words


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_options_of_a_page_exist(page: Path) -> None:
    options = [option for command in (GROUP, *COMMANDS.values()) for option in command.params]
    known = {name for option in options for name in (*option.opts, *option.secondary_opts)}
    files = [path for folder in ("profiling", "tests/interop") for path in (ROOT / folder).glob("*.py")]
    scripts = "\n".join(path.read_text(encoding="utf-8") for path in files)
    named = {word for code in INLINE.findall(prose(page)) for word in code.split() if re.fullmatch(r"--[\w-]+", word)}
    unknown = {option for option in named - known - FOREIGN_OPTIONS - {"--help"} if f'"{option}"' not in scripts}
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_a_page_names_exist(page: Path) -> None:
    named = {word for code in INLINE.findall(prose(page)) for word in code.split() if word.endswith(".py")}
    lost = {file for file in named if not any((ROOT / place / file).is_file() for place in ("", "qlora_lite"))}
    assert not lost


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_of_a_page_lead_to_files(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose(page))
    lost = [target for target in targets if not (page.parent / target).exists()]
    assert not lost


def test_every_page_is_in_the_table_of_contents() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    listed = set(re.search(r"^```\{toctree\}\n(.*?)^```", index, re.DOTALL | re.MULTILINE)[1].split())  # type: ignore[index]
    assert {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"} <= listed
