"""Tests of the listing of what is learned: pieces of text against whole decodings, escapes, and the page as parsed."""

from __future__ import annotations

import html.parser
import itertools
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data.encoding import TokenizedExample
from qlora_lite.data.listing import (
    ASCII_MARKS,
    CONTEXT,
    Piece,
    ShownExample,
    _spread,
    bad_lines,
    bars,
    page,
    pieces_of,
    shown_examples,
    visible,
    visible_line,
)
from qlora_lite.data.summary import summarize
from qlora_lite.data.tokenization import DataConfig, TokenizedSet, tokenize_all, tokenize_sources

Named = Callable[..., Any]
ODD = "a\x1b[31m\x9b\x00\t\r\u202e\u2028\u00ad\ue000\n\u200d\u200cé漢😀"
SEEN = "a\\x1b[31m\\x9b\\x00\\t\\r\\u202e\\u2028\\xad\\ue000\n\u200d\u200cé漢😀"


def test_what_a_terminal_obeys_or_nobody_sees_is_an_escape() -> None:
    assert visible(ODD) == SEEN and visible_line(ODD) == SEEN.replace("\n", "\\n")
    assert visible("\udcff") == "\\udcff" and visible("") == ""


def with_special(core: Any) -> SimpleNamespace:
    """A tokenizer of what listing.py uses, around one of the package tokenizers; token 0 is special."""
    return SimpleNamespace(
        decode=lambda ids, **options: core.decode(ids, skip_special_tokens=False),
        added_tokens_decoder={0: SimpleNamespace(special=True)},
        ids=lambda text: core.encode(text, add_special_tokens=False).ids,
    )


def byte_level() -> SimpleNamespace:
    """As GPT-2: a token for each byte, and some of several; a space and half a character may be one token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "ð"), ("Ġð", "Ł"), ("a", "b"), ("Ġ", "a")]
    names = ["<s>", *alphabet, *("".join(pair) for pair in merges)]
    core = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>"])
    return with_special(core)


def byte_fallback() -> SimpleNamespace:
    """As sentencepiece: ▁ for spaces, bytes for unknown characters, and the first space of a text is no text."""
    from tokenizers import Tokenizer, decoders, models, normalizers

    bytes_ = [f"<0x{number:02X}>" for number in range(256)]
    names = ["<s>", "<unk>", *bytes_, "▁", "a", "b", "é", "▁a"]
    vocabulary = {name: number for number, name in enumerate(names)}
    core = Tokenizer(models.BPE(vocabulary, [("▁", "a")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence(steps)
    core.add_special_tokens(["<s>"])
    return with_special(core)


TOKENIZERS = {"byte level": byte_level(), "byte fallback": byte_fallback()}
TEXTS = st.lists(st.sampled_from([*"ab é漢😀\n", "<s>", " 😀", "\ufffd"]), min_size=1, max_size=60).map("".join)


def example_of(ids: list[int], learned: list[bool]) -> TokenizedExample:
    labels = [token if is_learned else IGNORE_INDEX for token, is_learned in zip(ids, learned, strict=True)]
    return TokenizedExample(ids, labels)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=TEXTS, seed=st.randoms(use_true_random=False), copies=st.sampled_from([1, 5]))
@settings(max_examples=150, deadline=None)
def test_pieces_join_to_the_whole_text_wherever_it_is_cut(name: str, text: str, seed: Any, copies: int) -> None:
    tokenizer = TOKENIZERS[name]
    if name == "byte fallback":  # its decoder also writes \ufffd for characters that are whole
        text = text.replace("\ufffd", "b")
    ids = tokenizer.ids(text * copies)
    learned = [seed.random() < 0.5 for _ in ids]
    pieces = pieces_of(example_of(ids, learned), tokenizer)
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids)
    assert all(piece.text for piece in pieces)
    special = "".join(piece.text for piece in pieces if piece.special)
    assert special.replace(" ", "") == "<s>" * ids.count(0)


@pytest.mark.parametrize("every", [1, 2, 5, 7, CONTEXT, CONTEXT + 1])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_borders_within_characters_spoil_none_however_far_they_are(name: str, every: int) -> None:
    ids = TOKENIZERS[name].ids("漢" * CONTEXT * 2)
    pieces = pieces_of(example_of(ids, [number // every % 2 == 1 for number in range(len(ids))]), TOKENIZERS[name])
    assert "".join(piece.text for piece in pieces) == TOKENIZERS[name].decode(ids)


@pytest.mark.parametrize("name", TOKENIZERS)
def test_what_is_learned_is_exact_at_borders_of_characters(name: str) -> None:
    """Also far behind the beginning, where earlier tokens are left out of the decoding."""
    tokenizer = TOKENIZERS[name]
    parts = ["<s>", "漢 😀a", " a é漢漢", "b\n", "<s>", " ab"] * (CONTEXT // 4)
    ids, learned, expected = [], [], []
    for number, part in enumerate(parts):
        # A tokenizer as sentencepiece's puts a space before each text of its own.
        of_part = tokenizer.ids(part) if name == "byte level" else tokenizer.ids(f"<s>{part}")[1:]
        ids += of_part
        learned += [number % 2 == 1] * len(of_part)
        expected.append((part, number % 2 == 1))
    text = tokenizer.decode(ids)
    pieces = pieces_of(example_of(ids, learned), tokenizer)
    assert "".join(piece.text for piece in pieces) == text
    for is_learned in (True, False):
        found = "".join(piece.text for piece in pieces if piece.learned == is_learned)
        wanted = "".join(part for part, flag in expected if flag == is_learned)
        assert found.replace(" ", "") == wanted.replace(" ", "")
        if name == "byte level":
            assert found == wanted


def test_half_a_character_at_the_end_spoils_no_other() -> None:
    for tokenizer in TOKENIZERS.values():
        ids = tokenizer.ids("漢漢漢漢漢")
        (piece,) = pieces_of(example_of(ids[:-1], [False] * (len(ids) - 1)), tokenizer)
        assert piece.text.rstrip("\ufffd") == "漢漢漢漢" and piece.text.endswith("\ufffd")
    ids = TOKENIZERS["byte level"].ids("a 😀")[:-1]  # the space is in a token of the half
    (piece,) = pieces_of(example_of(ids, [False] * len(ids)), TOKENIZERS["byte level"])
    assert piece.text.startswith("a \ufffd")


def test_a_decoder_that_writes_backwards_gives_each_piece_alone() -> None:
    tokenizer = SimpleNamespace(decode=lambda ids, **_: "".join(chr(97 + number) for number in reversed(ids)))
    ids = [*range(10), *range(10, 20)]
    pieces = pieces_of(example_of(ids, [False] * 10 + [True] * 10), tokenizer)
    assert pieces == [Piece("jihgfedcba", False, False), Piece("tsrqponmlk", True, False)]


def test_the_first_token_is_not_learned_and_decoding_changes_no_spaces(word_tokenizer: Named) -> None:
    tokenizer = word_tokenizer()
    tokenizer.clean_up_tokenization_spaces = True
    tokens = tokenize_all([{"text": "a b ?"}], tokenizer).examples[0]
    assert pieces_of(tokens, tokenizer) == [
        Piece("a", False, False),
        Piece(" b ?", True, False),
        Piece(" </s>", True, True),
    ]


def test_marks_are_around_what_is_learned_alone() -> None:
    pieces = [
        Piece("a⟦\x1b", False, False),
        Piece("b⟧\n", True, False),
        Piece("</s>", True, True),
        Piece("[[", False, False),
    ]
    shown = ShownExample("x\n.jsonl", 3, 1200, 7, 9, 4, 12, pieces)
    assert shown.marked() == "a\\u27e6\\x1b⟦b\\u27e7\n</s>⟧[["
    assert shown.marked(ASCII_MARKS) == "a⟦\\x1b[[b⟧\n</s>]]\\u005b\\u005b"
    assert shown.heading == "x\\n.jsonl, example 3 of 1,200 (record 7): 9 tokens, truncated from 12, 4 learned"
    assert json.loads(json.dumps(shown.to_json()))["pieces"][1] == {"text": "b⟧\n", "learned": True, "special": False}


@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 80))
@settings(max_examples=200, deadline=None)
def test_shown_examples_are_spread_evenly_and_begin_each_source(sizes: list[int], count: int) -> None:
    chosen = _spread(sizes, count)
    assert len(chosen) == len(set(chosen)) == min(count, sum(sizes)) and chosen == sorted(chosen)
    assert all(0 <= index < sizes[part] for part, index in chosen)
    if count >= len(sizes):
        assert {(part, 0) for part in range(len(sizes))} <= set(chosen)
    for part, size in enumerate(sizes):
        places = [index for number, index in chosen if number == part]
        gaps = [after - before for before, after in itertools.pairwise([*places, size])]
        assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.fixture
def tokenized(word_tokenizer: Named, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TokenizedSet:
    """Three examples of one source, of which one is shortened, one of another, and bad records."""
    monkeypatch.chdir(tmp_path)
    Path("one.jsonl").write_text(
        '{"prompt": "a", "completion": "b c d"}\n{"<b>": 1}\n{"prompt": "a", "completion": "b"}\n'
        '{"<b>": 1}\n{"<b>": 1}\n{"prompt": "a", "completion": "b b b b b"}\n',
        encoding="utf-8",
    )
    Path("two.jsonl").write_text('{"prompt": "d", "completion": "</s> a"}\nnot <json>\n', encoding="utf-8")
    return tokenize_sources(["one.jsonl", "two.jsonl"], word_tokenizer(), DataConfig(8, skip_bad=9), cache=False)


def test_shown_examples_are_what_is_trained_on(tokenized: TokenizedSet, word_tokenizer: Named) -> None:
    first, last, other = shown_examples(tokenized, word_tokenizer(), 3)
    assert first.heading == "one.jsonl, example 1 of 3 (record 1): 8 tokens, 5 learned"
    assert first.marked() == "user a </s>⟦ assistant b c d </s>⟧"
    assert (last.number, last.record) == (2, 3)
    assert other.marked() == "user d </s>⟦ assistant </s> a </s>⟧" and other.source == "two.jsonl"
    (_, _, cut, _) = shown_examples(tokenized, word_tokenizer(), 99)
    assert (cut.tokens, cut.length, cut.learned_tokens, cut.record) == (8, 10, 5, 6)
    assert cut.marked() == "user a </s>⟦ assistant b b b b⟧"
    assert shown_examples(tokenized, word_tokenizer(), 0) == []


def test_bad_records_are_all_listed_and_those_not_kept_are_counted(tokenized: TokenizedSet) -> None:
    first, second = bad_lines(tokenized.parts)
    assert first.startswith("one.jsonl, lines 2, 4-5: unknown shape with keys <b>;")
    assert second.startswith("two.jsonl, line 2: not valid JSON (Expecting value at column 1), got 'not <json>'")
    tokenized.parts[1].bad.count = 1003
    assert bad_lines(tokenized.parts)[2:] == ["and 1,002 more, which are not listed"]


def test_bars_begin_with_the_shortest_example_and_say_what_is_cut(word_tokenizer: Named) -> None:
    records = [{"text": "a " * length} for length in (30, 31, 35, 39)]
    summary = summarize(tokenize_all(records, word_tokenizer(), 35))
    assert [tuple(bar) for bar in bars(summary)] == [
        ("31-35", 2, False, "--max-length 35"),
        ("36-40", 2, True, ""),
    ]
    short = bars(summarize(tokenize_all(records, word_tokenizer(), 2)))
    assert [bar.lengths for bar in short] == ["1-5", "6-10", "11-15", "16-20", "21-25", "26-30", "31-35", "36-40"]
    assert [bar.mark for bar in short if bar.mark] == ["--max-length 2"] and [bar.is_cut for bar in short][:2] == [
        False,
        True,
    ]
    one = summarize(tokenize_all([{"text": "a"}], word_tokenizer(), 64))
    assert [tuple(bar) for bar in bars(one)] == [("2", 1, False, "")]


class Elements(html.parser.HTMLParser):
    """The elements of a page: (tag, attributes, text within), and whether all are closed in order."""

    VOID = ("meta",)

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None], list[str]]] = []
        self._open: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = (tag, dict(attrs), [""])
        self.found.append(element)
        if tag not in self.VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        for _, _, text in self._open:
            text[0] += data

    def texts(self, tag: str) -> list[str]:
        return [text for name, _, (text,) in self.found if name == tag]


def test_the_page_says_all_and_obeys_nothing_of_the_data(tokenized: TokenizedSet, word_tokenizer: Named) -> None:
    summary = summarize(tokenized, longest_sequence=64)
    shown = shown_examples(tokenized, word_tokenizer(), 4)
    evil = ShownExample(
        "<i>&", 1, 1, 1, 3, 1, 3, [Piece("<script>\x1b&amp;", False, False), Piece("</pre>", True, True)]
    )
    text = page(summary, bad_lines(tokenized.parts), [*shown, evil], "<title> & \x07")
    assert all(character.isprintable() or character == "\n" for character in text)
    read = Elements(text)
    tags = {name for name, _, _ in read.found}
    assert not tags & {"script", "img", "link", "iframe", "a"} and not re.search(
        r"https?:|url\(|@import|\bon\w+=", text
    )
    assert all(
        set(attributes) <= {"class", "style", "lang", "charset", "name", "content", "http-equiv"}
        for _, attributes, _ in read.found
    )
    assert read.texts("title") == read.texts("h1") == ["<title> & \\x07"]
    headings = ["Sources", "What becomes of them", "Length of the examples", "Bad records", "Examples"]
    assert read.texts("h2") == headings
    cells = ["6", "3 prompt and completion", "none", "3", "3", "2", "1 prompt and completion", "none", "1", "1"]
    assert read.texts("td")[: len(cells)] == cells
    figures = dict(zip(read.texts("dt"), read.texts("dd"), strict=True))
    assert figures == dict(summary.figures()) and figures["examples shortened"] == "1 at 8 tokens"
    assert read.texts("li") == bad_lines(tokenized.parts)
    assert [note for note in read.texts("p") if note in summary.length_notes()] == summary.length_notes()
    assert read.texts("h3") == [example.heading for example in [*shown, evil]]
    assert (
        read.texts("pre")[0] == "\nuser a </s> assistant b c d </s>"
        and read.texts("pre")[-1] == "\n<script>\\x1b&amp;</pre>"
    )
    assert read.texts("mark")[1:] == [
        " assistant b c d </s>",
        " assistant b </s>",
        " assistant b b b b",
        " assistant </s> a </s>",
        "</pre>",
    ]
    assert "\\x1b" in read.texts("u")
    widths = [attributes["style"] for name, attributes, _ in read.found if name == "i"]
    assert widths == ["width:70.00%", "width:70.00%", "width:70.00%", "width:70.00%"] and read.texts("b") == [
        "--max-length 8"
    ]


def test_a_page_without_bad_records_and_examples_has_no_such_section(word_tokenizer: Named) -> None:
    summary = summarize(tokenize_all([{"text": "a b"}], word_tokenizer(), 64))
    headings = Elements(page(summary, [], [], "t")).texts("h2")
    assert headings == ["Sources", "What becomes of them", "Length of the examples"]
