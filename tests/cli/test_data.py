"""Tests of `qlora-lite data`: the whole of what is printed, the page, the JSON line, statuses, and hostile data."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from qlora_lite.cli.data import ALL, _print_examples, histogram
from qlora_lite.cli.main import main
from qlora_lite.data import tokenization
from qlora_lite.data.listing import Piece, ShownExample
from qlora_lite.data.summary import summarize
from qlora_lite.data.tokenization import DataConfig, tokenize_all
from qlora_lite.errors import CheckpointError

Data = Callable[..., tuple[int, str, str]]

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello\nyou"}], "id": 7}
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
def model(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's config and tokenizer, whose tokens are decoded without spaces between them. No weights."""
    folder = tmp_path_factory.mktemp("model")
    for path in [*tiny_folder.glob("*.json"), *tiny_folder.glob("*.jinja")]:
        shutil.copy(path, folder)
    core = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")) | {"decoder": {"type": "Fuse"}}
    (folder / "tokenizer.json").write_text(json.dumps(core), encoding="utf-8")
    return folder


@pytest.fixture
def data(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> Data:
    """(words) -> (exit status, what was printed, what was said on stderr), in a folder with three sources."""
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    long = {"prompt": "x" * 70, "completion": "never reached"}
    lines = [json.dumps(CHAT), "{}", json.dumps(CHAT), "[", json.dumps(long), "{}", json.dumps({"text": "free"})]
    Path("chats.jsonl").write_text("\n".join(lines), encoding="utf-8")
    Path("pairs.csv").write_text("prompt,completion\na,b\nc,d\n", encoding="utf-8")
    Path("good.jsonl").write_text('{"text": "free text"}\n', encoding="utf-8")

    def run(*words: object) -> tuple[int, str, str]:
        given = ["qlora-lite", "data", *map(str, words), "--model", str(model)]
        monkeypatch.setattr(sys, "argv", given)
        with pytest.raises(SystemExit) as ended:
            main()
        return (int(ended.value.code or 0), *capsys.readouterr())

    return run


PRINTED = """\
chats.jsonl
  records        7
  shapes         2 messages, 1 prompt and completion, 1 text
  keys not read  id (in 2)
  bad records    3
  examples       4

all records
  examples to train on  3
  conversations split   0
  duplicate records     1
  examples shortened    0 at 64 tokens
  examples dropped      1: 1 with nothing to learn before the cut
  tokens                35: 24 learned (69%), 11 not
  learned tokens lost   14 (36.8%) at 64 tokens
  packed rows           54.7% full at 64 tokens

tokens of the examples before they are shortened
   1-10  █████████████████████████                          1
  11-20  ██████████████████████████████████████████████████ 2
  21-30                                                     0
  31-40                                                     0
  41-50                                                     0
  51-60                                                     0
  61-70                                                     0 ◀ --max-length 64
  71-80                                                     0
  81-90  ░░░░░░░░░░░░░░░░░░░░░░░░░                          1
  5 to 87 tokens, median 15, 99% have at most 87
  proposed: --max-length 128, the smallest multiple of 64 that leaves 99% of the examples whole
  the model's longest sequence: 2,048 tokens

3 bad records
  chats.jsonl, lines 2, 6: unknown shape with keys none; {shapes}
  chats.jsonl, line 4: not valid JSON (Expecting value at column 2), got '['; write one JSON object per line

2 of 3 examples; learned text is between ⟦ and ⟧

chats.jsonl, example 1 of 3 (record 1): 15 tokens, 10 learned
<user>Hi</s><assistant>⟦Hello
you</s>⟧

chats.jsonl, example 2 of 3 (record 3): 15 tokens, 10 learned
<user>Hi</s><assistant>⟦Hello
you</s>⟧
"""


def test_all_is_printed_and_bad_records_end_it_with_status_1(data: Data) -> None:
    status, out, said = data("chats.jsonl", "--max-length", 64, "--show", 2)
    shapes = re.search(r"keys none; (use one of: .*)", out)
    assert shapes is not None and out == PRINTED.replace("{shapes}", shapes[1])
    assert (status, said) == (
        1,
        "error: bad records: 3 of 7 in chats.jsonl; --skip-bad allows 0 of each source: correct them, or leave them "
        "out with --skip-bad 3\n",
    )
    status, again, said = data("chats.jsonl", "--max-length", 64, "--show", 2, "--skip-bad", 3)
    assert (status, said) == (0, "")
    assert again == out.replace("examples       4", "examples       4, their tokens read from the cache")
    assert data("chats.jsonl", "--skip-bad", 2)[0] == 1


def test_every_option_of_the_records_is_obeyed(data: Data, tmp_path: Path) -> None:
    Path("odd.jsonl").write_text('{"q": {"x": "one"}, "a": "two"}\n{"q": {"x": "3"}, "a": "4"}\n', encoding="utf-8")
    words = ("odd.jsonl", "--field", "prompt=q.x", "--field", "completion=a", "--no-token-cache", "--show", 9)
    status, out, said = data(*words)
    assert (status, said) == (0, "") and "<user>one</s><assistant>⟦two</s>⟧" in out and "2 of 2 examples" in out
    assert not list(tmp_path.glob(".odd*"))
    assert "1 of 1 examples" in data(*words, "--limit", 1)[1]
    assert "<user>⟦one</s><assistant>two</s>⟧" in data(*words, "--learn", "all")[1]
    cut = data(*words, "--max-length", 8)[1]
    assert "(record 1): 8 tokens, truncated from 10, 2 learned\n<user>one</s><assistant>⟦tw⟧\n" in cut
    assert cut.count("truncated from") == 1 and "shortened    1 at 8 tokens" in cut
    turns = [{"role": role, "content": role[0]} for role in ("user", "assistant", "user", "assistant")]
    Path("turns.jsonl").write_text(json.dumps({"messages": turns}), encoding="utf-8")
    for learn, text in (
        ("answers", "⟦a</s>⟧<user>u</s><assistant>⟦a</s>⟧"),
        ("last-answer", "a</s><user>u</s><assistant>⟦a</s>⟧"),
    ):
        assert f"<user>u</s><assistant>{text}" in data("turns.jsonl", "--learn", learn)[1]


def test_options_become_the_settings_of_the_records(data: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[Any, ...]] = []

    def keep(sources: list[str], tokenizer: Any, config: DataConfig, cache: bool, show: Any, images: Any) -> None:
        seen.append((sources, config, cache))
        raise CheckpointError("seen")

    monkeypatch.setattr(tokenization, "tokenize_sources", keep)
    words = ("a=1", "--skip-bad", 3, "--learn-empty-reasoning", "b=2", "--learn", "all", "--limit", 7)
    assert data(*words, "--field", "text=body", "--no-token-cache", "--max-length", 9) == (1, "", "error: seen\n")
    assert data("c")[0] == 1
    # Bad records are shown, whatever --skip-bad is.
    assert seen == [
        (["a=1", "b=2"], DataConfig(9, "all", True, {"text": "body"}, 7, ALL), False),
        (["c"], DataConfig(512, skip_bad=ALL), True),
    ]


def test_sources_are_listed_one_by_one_with_their_shares(data: Data) -> None:
    status, out, _ = data("good.jsonl=0.25", "pairs.csv=0.75", "--show", 2)
    assert status == 0 and out.startswith("good.jsonl\n") and "\npairs.csv\n  records        2\n" in out
    assert "of an epoch    1 examples (25%)\n" in out and "of an epoch    2 examples (75%)\n" in out
    assert "good.jsonl, example 1 of 1 (record 1)" in out and "pairs.csv, example 1 of 2 (record 1)" in out
    assert "\nf⟦ree text</s>⟧\n" in out


def test_the_json_line_has_all_and_examples_if_asked(data: Data) -> None:
    status, out, _ = data("chats.jsonl", "pairs.csv", "--json", "--show", 1, "--max-length", 100)
    found = json.loads(out.splitlines()[-1])
    assert status == 1 and found["records"] == 9 and found["max_length"] == 100 and found["longest_sequence"] == 2048
    assert [source["source"] for source in found["sources"]] == ["chats.jsonl", "pairs.csv"]
    assert [bad["place"] for bad in found["bad_records"]] == [f"chats.jsonl, line {number}" for number in (2, 4, 6)]
    assert found["bad_records"][0]["reason"].startswith("unknown shape with keys none;")
    (shown,) = found["shown"]
    assert (shown["source"], shown["number"], shown["record"], shown["tokens"]) == ("chats.jsonl", 1, 1, 15)
    assert shown["pieces"] == [
        {"text": "<user>", "learned": False, "special": True},
        {"text": "Hi", "learned": False, "special": False},
        {"text": "</s><assistant>", "learned": False, "special": True},
        {"text": "Hello\nyou", "learned": True, "special": False},
        {"text": "</s>", "learned": True, "special": True},
    ]
    assert "shown" not in json.loads(data("good.jsonl", "--json")[1].splitlines()[-1])


def test_the_page_is_written_whole_with_twenty_examples(data: Data) -> None:
    Path("many.jsonl").write_text("".join(f'{{"text": "number {n} <"}}\n' for n in range(30)), encoding="utf-8")
    status, out, said = data("many.jsonl", "chats.jsonl", "--html", "out/page.html")
    text = Path("out/page.html").read_text(encoding="utf-8")
    assert status == 1 and said.startswith("error: bad records:") and out.count("example 1 of 30") == 1
    assert text.count("<article>") == 20 and text.endswith("</html>\n") and "n<mark>umber 0 &lt;<span" in text
    assert "learns from many.jsonl, chats.jsonl</title>" in text and text.count("<li>") == 2
    status, _, said = data("many.jsonl", "--html", "out/page.html")
    assert (status, said) == (1, "error: out/page.html exists; name another file, or ask for overwrite\n")
    assert data("many.jsonl", "--html", "out/page.html", "--overwrite", "--show", 2)[0] == 0
    assert Path("out/page.html").read_text(encoding="utf-8").count("<article>") == 2


def test_each_source_may_have_as_many_bad_records_as_are_allowed(data: Data) -> None:
    for name, bad in (("one", 1), ("two", 2)):
        Path(f"{name}.jsonl").write_text('{"text": "a"}\n' + "{}\n" * bad, encoding="utf-8")
    assert data("one.jsonl", "two.jsonl", "--skip-bad", 2)[0] == 0
    status, out, said = data("one.jsonl", "two.jsonl", "--skip-bad", 1)
    assert status == 1 and "error: bad records: 2 of 3 in two.jsonl; --skip-bad allows 1 of each source" in said
    assert "3 bad records\n  one.jsonl, line 2: unknown" in out and "  two.jsonl, lines 2-3: unknown" in out


def test_nothing_to_learn_lists_the_bad_records_first(data: Data) -> None:
    Path("bad.jsonl").write_text('{"text": 1}\n{"text": 2}\n', encoding="utf-8")
    status, out, said = data("bad.jsonl", "good.jsonl", "--skip-bad", 5, "--html", "page.html", "--json")
    assert status == 1 and not Path("page.html").exists()
    assert out == (
        "2 bad records\n  bad.jsonl, line 1: text must be a string, got int 1; write it as text in quotes\n"
        "  bad.jsonl, line 2: text must be a string, got int 2; write it as text in quotes\n\n"
    )
    assert said == (
        "error: there is nothing to train on in bad.jsonl: got 2 bad records and no other; give records with answers "
        "that fit\n"
    )


def hostile() -> dict[str, Any]:
    """A record whose texts and keys would clear a terminal, ring, change colours, and be markup."""
    text = "\x1b[2J\x9b31m\x07\r[bold red]x[/] :smile: \u202e"
    answer = {"role": "assistant", "content": f"{text} ⟦"}
    return {"messages": [{"role": "user", "content": text}, answer], f"\x1b]0;title\x07{text}\n": 1}


@pytest.mark.parametrize("colours", [True, False])
def test_what_the_data_holds_is_not_obeyed(data: Data, colours: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "\x1b[5m[blink]x.jsonl"
    wrong = '{"\\u001b[41m": 1}'
    Path(name).write_text(f"{json.dumps(hostile())}\n{wrong}\n", encoding="utf-8")
    if colours:
        monkeypatch.setenv("FORCE_COLOR", "1")
        monkeypatch.setenv("TERM", "xterm-256color")
    status, out, said = data(name, "--html", "page.html")
    assert status == 1 and said.count("\n") == 1
    plain = ANSI.sub("", out)
    assert (plain != out) == colours
    for text in (plain, said, Path("page.html").read_text(encoding="utf-8")):
        assert all(character.isprintable() or character == "\n" for character in text), ascii(text)
    assert "\\x1b[5m[blink]x.jsonl, example 1 of 1" in plain
    assert "\\x1b]0;title\\x07\\x1b[2J\\x9b31m\\x07\\r[bold red]x[/] :smile: \\u202e\\n (in 1)" in plain
    assert "unknown shape with keys \\x1b[41m;" in plain
    # The tiny tokenizer has no tokens for characters beyond ASCII.
    seen = "\\r[bold red]x[/] :smile: "
    assert seen in plain and ("⟦" in plain) != colours


def printed(console: Console, pieces: list[Piece]) -> str:
    _print_examples(console, [ShownExample("a", 1, 1, 1, 3, 1, 3, pieces)], 1)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue().split("\n", 3)[3]


def test_colours_tell_what_is_learned_and_brackets_where_there_are_none() -> None:
    pieces = [
        Piece("<s>", False, True),
        Piece("a\t", False, False),
        Piece("⟦b" * 100, True, False),
        Piece("</s>", True, True),
    ]
    terminal = {"force_terminal": True, "width": 20, "legacy_windows": False}
    coloured = printed(Console(file=io.StringIO(), color_system="standard", _environ={}, **terminal), pieces)
    learned = "⟦b" * 100
    assert coloured == (f"\x1b[2;7m<s>\x1b[0ma\x1b[33m\\t\x1b[0m\x1b[1;32m{learned}\x1b[0m\x1b[1;7;32m</s>\x1b[0m\n")
    bracketed = f"<s>a\\t⟦{learned.replace('⟦', chr(92) + 'u27e6')}</s>⟧\n"
    for console in (
        Console(file=io.StringIO(), _environ={}, width=20),
        Console(file=io.StringIO(), color_system="standard", _environ={"NO_COLOR": "1"}, **terminal),
        Console(file=io.StringIO(), _environ={"TERM": "dumb"}, **terminal),
    ):
        assert printed(console, pieces) == bracketed


def test_a_text_that_ends_its_line_gets_no_second_end() -> None:
    for text, shown in (("a", "⟦a⟧\n"), ("a\n", "⟦a\n⟧\n")):
        assert printed(Console(file=io.StringIO(), _environ={}), [Piece(text, True, False)]) == shown
    ended = printed(Console(file=io.StringIO(), _environ={}), [Piece("a", True, False), Piece("\n", False, False)])
    assert ended == "⟦a⟧\n"


def test_a_stream_without_these_characters_gets_ascii(word_tokenizer: Any) -> None:
    raw = io.TextIOWrapper(io.BytesIO(), "ascii")
    console = Console(file=raw, _environ={}, width=80)
    _print_examples(
        console, [ShownExample("a", 1, 1, 1, 2, 1, 2, [Piece("a", False, False), Piece("b", True, False)])], 1
    )
    raw.seek(0)
    assert raw.read().endswith("\na[[b]]\n")
    summary = summarize(tokenize_all([{"text": "a " * n} for n in (1, 2, 2, 9)], word_tokenizer(), 4))
    assert histogram(summary, 30, ascii_only=True) == [
        " 2  ####     1",
        " 3  ######## 2",
        " 4           0 < --max-length 4",
    ] + [f"{n:>2}           0" for n in range(5, 10)] + ["10  ----     1"]


@pytest.mark.parametrize("width", [20, 40, 60, 100, 200])
def test_bars_stay_within_the_width_where_it_is_not_too_narrow(word_tokenizer: Any, width: int) -> None:
    records = [{"text": "a " * (n % 37 + 1)} for n in range(3000)]
    lines = histogram(summarize(tokenize_all(records, word_tokenizer(), 20)), width)
    assert max(map(len, lines)) <= max(width, 46)
    counts = [
        int(line.split()[2 if set(line.split()[1]) <= set("█░▏▎▍▌▋▊▉") else 1].replace(",", "")) for line in lines
    ]
    assert sum(counts) == 3000


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        ((), 2, "Missing argument 'SOURCE...'"),
        (("",), 2, "sources must not be empty"),
        (("nowhere.jsonl",), 1, "nowhere.jsonl does not exist"),
        (("good.jsonl=0.5", "pairs.csv"), 2, "give all sources a weight, or none; got 1 weights for 2 sources"),
        (("good.jsonl", "--show", "-1"), 2, "--show must be an integer of at least 0; got -1"),
        (("good.jsonl", "--skip-bad", "-1"), 2, "skip_bad must be an integer of at least 0; got -1"),
        (("good.jsonl", "--limit", "0"), 2, "limit must be None or at least 1; got 0"),
        (("good.jsonl", "--max-length", "1"), 2, "max_length must be None or at least 2; got 1"),
        (("good.jsonl", "--learn", "most"), 2, "learn must be one of all, answers, last-answer; got 'most'"),
        (("good.jsonl", "--field", "prompt"), 2, "--field must be KEY=NAME"),
        (("good.jsonl", "--field", "question=q"), 2, "fields must name keys of the shapes"),
        (("good.jsonl", "--html", "page.txt"), 2, "the file must be named *.html; got page.txt"),
        (("own.html", "--html", "own.html", "--overwrite"), 1, "own.html would replace the input"),
    ],
)
def test_wrong_options_are_one_sentence_and_nothing_is_written(
    data: Data, words: tuple[str, ...], status: int, message: str, tmp_path: Path
) -> None:
    Path("own.html").write_text('{"text": "mine"}', encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    found, out, said = data(*words)
    assert (found, out) == (status, "") and message in said and said.startswith("error: ") and said.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before and Path("own.html").read_text(encoding="utf-8") == '{"text": "mine"}'
