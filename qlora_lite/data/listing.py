"""What is learned from a set of records, listed: figures, lengths, bad records, and examples with what is learned.

    TokenizedSet, Summary -> figures, bars, shown examples -> the command's text, or one HTML page

The text of an example is decoded from the tokens that are trained on. Data may hold anything: what a terminal would
obey, or a reader would not see, is shown as an escape.
"""

from __future__ import annotations

import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import NamedTuple

from qlora_lite.compute.cross_entropy import IGNORE_INDEX
from qlora_lite.data.encoding import TokenizedExample, Tokenizer
from qlora_lite.data.summary import Summary
from qlora_lite.data.tokenization import SourceTokens, TokenizedSet

# Control, format and private characters, surrogates, and separators of lines. The two joiners shape letters and emoji.
HIDDEN = {"Cc", "Cf", "Co", "Cs", "Zl", "Zp"}
SHOWN_AS_THEY_ARE = "\n\u200c\u200d"
MARKS, ASCII_MARKS = ("\u27e6", "\u27e7"), ("[[", "]]")  # around what is learned, where there are no colours
# Tokens before a border that are decoded with those behind it, and characters that these may change.
CONTEXT, MOST_CHANGED = 64, 8
UNKNOWN = "\ufffd"  # in the place of bytes that are not UTF-8
BAR_ROOM = 70  # percent of a cell, for the longest bar of the page; marks stand behind the bars


def visible_parts(text: str) -> Iterator[tuple[str, bool]]:
    """Yields the parts of a text, and whether each is made of escapes for characters that would not be seen."""
    for hidden, part in itertools.groupby(text, key=_is_hidden):
        shown = "".join(part)
        yield (shown.encode("unicode_escape", "surrogatepass").decode() if hidden else shown), hidden


def _is_hidden(character: str) -> bool:
    return unicodedata.category(character) in HIDDEN and character not in SHOWN_AS_THEY_ARE


def visible(text: str) -> str:
    """The text with escapes such as `\\x1b` for characters that would not be seen. Newlines are kept."""
    return "".join(part for part, _ in visible_parts(text))


def visible_line(text: str) -> str:
    """The same with escapes for newlines, too."""
    return visible(text).replace("\n", "\\n")


class Piece(NamedTuple):
    """Successive tokens as text. learned: the loss counts them. special: they are special tokens."""

    text: str
    learned: bool
    special: bool


@dataclass(frozen=True)
class ShownExample:
    """One example as it is trained on.

    number, of: its place among the examples of its source. record: the number of its record there; both count from 1.
    length: its tokens before it was truncated.
    """

    source: str
    number: int
    of: int
    record: int
    tokens: int
    learned_tokens: int
    length: int
    pieces: list[Piece]

    @property
    def heading(self) -> str:
        """Source, number and size in one line."""
        cut = f", truncated from {self.length:,}" if self.length > self.tokens else ""
        place = f"{visible_line(self.source)}, example {self.number:,} of {self.of:,} (record {self.record:,})"
        return f"{place}: {self.tokens:,} tokens{cut}, {self.learned_tokens:,} learned"

    def marked(self, marks: tuple[str, str] = MARKS) -> str:
        """The text with marks around what is learned, for where there are no colours."""
        texts = []
        for learned, group in itertools.groupby(self.pieces, key=lambda piece: piece.learned):
            text = visible("".join(piece.text for piece in group))
            for mark in marks:  # the data may have them too
                text = text.replace(mark, "".join(f"\\u{ord(character):04x}" for character in mark))
            texts.append(f"{marks[0]}{text}{marks[1]}" if learned else text)
        return "".join(texts)

    def to_json(self) -> dict[str, object]:
        """Returns the example as plain data for `json.dumps`."""
        return vars(self) | {"pieces": [piece._asdict() for piece in self.pieces]}


def shown_examples(tokenized: TokenizedSet, tokenizer: Tokenizer, count: int) -> list[ShownExample]:
    """Returns `count` examples spread evenly over a set, with the first one of each source if there are enough."""
    sets = tokenized.examples.parts
    return [
        _shown(tokenized.parts[part], part, index, tokenized, tokenizer)
        for part, index in _spread([len(examples) for examples in sets], count)
    ]


def _shown(source: SourceTokens, part: int, index: int, tokenized: TokenizedSet, tokenizer: Tokenizer) -> ShownExample:
    examples = tokenized.examples.parts[part]
    example, stored = examples[index], int(examples.chosen[index])
    record, length = int(source.arrays.records[stored]) + 1, int(source.arrays.lengths[stored])
    tokens, learned, pieces = len(example.input_ids), example.learned_tokens, pieces_of(example, tokenizer)
    return ShownExample(source.name, index + 1, len(examples), record, tokens, learned, length, pieces)


def _spread(sizes: Sequence[int], count: int) -> list[tuple[int, int]]:
    """(source, example) of `count` examples. Each source gets a share like that of its examples, from its first on."""
    count = min(count, sum(sizes))
    if count < len(sizes):
        return [(number * len(sizes) // count, 0) for number in range(count)]
    shares = [1] * len(sizes)
    for _ in range(count - len(sizes)):
        free = [number for number, size in enumerate(sizes) if shares[number] < size]
        shares[max(free, key=lambda number: sizes[number] / shares[number])] += 1
    return [
        (number, index * size // share)
        for number, (size, share) in enumerate(zip(sizes, shares, strict=True))
        for index in range(share)
    ]


def pieces_of(example: TokenizedExample, tokenizer: Tokenizer) -> list[Piece]:
    """Returns the text of an example, in pieces that are learned or not, and special tokens or not."""
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {number for number, token in added.items() if getattr(token, "special", False)}
    kinds = [
        (label != IGNORE_INDEX and position > 0, token in special)  # the first token is never predicted
        for position, (token, label) in enumerate(zip(example.input_ids, example.labels, strict=True))
    ]
    runs = [(kind, len(list(group))) for kind, group in itertools.groupby(kinds)]
    borders = [0, *itertools.accumulate(length for _, length in runs)]
    texts = _texts_between(example.input_ids, borders, tokenizer)
    return [Piece(text, *kind) for (kind, _), text in zip(runs, texts, strict=True) if text]


def _texts_between(ids: list[int], borders: list[int], tokenizer: Tokenizer) -> list[str]:
    """The text of the tokens between each two borders.

    Tokens are decoded with those before them, since their spaces may depend on these. A character of several tokens
    counts to its last one: the text before takes back what has changed.
    """
    texts: list[str] = []
    start, before = 0, ""
    for begin, end in itertools.pairwise(borders):
        after = _decoded(ids[start:end], tokenizer)
        same = len(before) if after.startswith(before) else _common(before, after)
        changed = len(before) - same
        if changed > MOST_CHANGED:  # this decoder does not write from left to right
            texts.append(_decoded(ids[begin:end], tokenizer))
        else:
            last = len(texts) - 1
            while changed > 0 and last >= 0:
                kept = max(0, len(texts[last]) - changed)
                changed -= len(texts[last]) - kept
                texts[last] = texts[last][:kept]
                last -= 1
            texts.append(after[same:])
        if begin - start >= CONTEXT and not before.endswith(UNKNOWN) and not after.endswith(UNKNOWN):
            start, after = begin, _decoded(ids[begin:end], tokenizer)
        before = after
    return texts


def _decoded(ids: list[int], tokenizer: Tokenizer) -> str:
    """The text of tokens. If bytes of the last character are missing, decoders may spoil those before it, too."""
    whole = ""
    for left in range(min(3, len(ids)) + 1):
        text = str(tokenizer.decode(ids[: len(ids) - left], clean_up_tokenization_spaces=False))
        whole = whole if left else text
        if not text.endswith(UNKNOWN):
            return whole if whole.startswith(text) else text + UNKNOWN
    return whole


def _common(one: str, other: str) -> int:
    pairs = enumerate(zip(one, other, strict=False))
    return next((number for number, (left, right) in pairs if left != right), min(len(one), len(other)))


class Bar(NamedTuple):
    """A bar of the histogram. is_cut: its examples are truncated. mark: what ends in it."""

    lengths: str
    examples: int
    is_cut: bool
    mark: str


def bars(summary: Summary) -> list[Bar]:
    """Returns the histogram of the lengths, with marks where `max_length` and the proposed one cut."""
    lengths = summary.lengths
    cuts = {} if summary.max_length is None else {f"--max-length {summary.max_length}": summary.max_length}
    if summary.max_length != lengths.proposed_max_length:
        cuts[f"proposed {lengths.proposed_max_length}"] = lengths.proposed_max_length
    found: list[Bar] = []
    for before, end, count in zip([0, *lengths.up_to], lengths.up_to, lengths.counts, strict=False):
        marks = ", ".join(name for name, length in cuts.items() if before < length <= end)
        if found or count or marks:  # the shortest example may be far from 0
            is_cut = summary.max_length is not None and before >= summary.max_length
            found.append(Bar(f"{before + 1:,}-{end:,}" if before + 1 < end else f"{end:,}", count, is_cut, marks))
    return found


def bad_lines(parts: Sequence[SourceTokens]) -> list[str]:
    """Returns one line for each reason and file, with the places of all bad records that were kept."""
    lines = [visible_line(line) for part in parts for line in part.bad.by_reason()]
    left = sum(part.bad.count - len(part.bad.kept) for part in parts)
    return [*lines, f"and {left:,} more, which are not listed"] if left else lines


def page(summary: Summary, bad: Sequence[str], shown: Sequence[ShownExample], title: str) -> str:
    """Returns one HTML page of figures, lengths, bad records and examples: no scripts, no network, light and dark."""
    share = summary.learned_tokens / summary.tokens
    style = files("qlora_lite.data").joinpath("listing.css").read_text(encoding="utf-8")
    head = [
        f"<h1>{escape(visible_line(title))}</h1>",
        f'<p class="headline"><strong>{share:.0%}</strong> of {summary.tokens:,} tokens are learned, in '
        f"{summary.examples:,} examples of {summary.records:,} records</p>",
    ]
    body = itertools.chain(head, _sources(summary), _fates(summary), _chart(summary), _bad(bad), _examples(shown))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(visible_line(title))}</title>\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(body)
        + "\n</main>\n</body>\n</html>\n"
    )


def _sources(summary: Summary) -> Iterator[str]:
    rows = [(visible_line(source.source), source.figures()) for source in summary.sources]
    yield '<section><h2>Sources</h2><div class="wide-table"><table class="sources"><thead><tr><th>source</th>'
    yield from (f"<th>{name}</th>" for name, _ in rows[0][1])
    yield "</tr></thead><tbody>"
    for source, figures in rows:
        cells = "".join(f"<td>{escape(visible_line(value))}</td>" for _, value in figures)
        yield f"<tr><th>{escape(source)}</th>{cells}</tr>"
    yield "</tbody></table></div></section>"


def _fates(summary: Summary) -> Iterator[str]:
    yield '<section><h2>What becomes of them</h2><dl class="figures">'
    yield from (f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in summary.figures())
    yield "</dl></section>"


def _chart(summary: Summary) -> Iterator[str]:
    shown = bars(summary)
    most = max(bar.examples for bar in shown)
    yield "<section><h2>Length of the examples</h2>"
    yield from (f'<p class="note">{escape(note)}</p>' for note in summary.length_notes())
    yield '<table class="bars"><thead><tr><th>tokens</th><th></th><th>examples</th></tr></thead><tbody>'
    for bar in shown:
        kind = " ".join(name for name, holds in (("cut", bar.is_cut), ("mark", bool(bar.mark))) if holds)
        drawn = f'<i style="width:{BAR_ROOM * bar.examples / most:.2f}%"></i>' if bar.examples else ""
        mark = f"<b>{escape(bar.mark)}</b>" if bar.mark else ""
        yield f'<tr class="{kind}"><th>{bar.lengths}</th><td>{drawn}{mark}</td><td>{bar.examples:,}</td></tr>'
    yield "</tbody></table></section>"


def _bad(lines: Sequence[str]) -> Iterator[str]:
    if lines:
        yield '<section><h2>Bad records</h2><ul class="bad">'
        yield from (f"<li>{escape(line)}</li>" for line in lines)
        yield "</ul></section>"


def _examples(shown: Sequence[ShownExample]) -> Iterator[str]:
    if not shown:
        return
    yield '<section><h2>Examples</h2><p class="note"><mark>Marked text</mark> is learned, <span class="special">'
    yield "special tokens</span> have a frame, and characters that would not be seen are <u>escapes</u>.</p>"
    for example in shown:
        yield f"<article><h3>{escape(example.heading)}</h3><pre>{_marked_up(example)}</pre></article>"
    yield "</section>"


def _marked_up(example: ShownExample) -> str:
    texts = []
    for learned, group in itertools.groupby(example.pieces, key=lambda piece: piece.learned):
        text = "".join(_piece_html(piece) for piece in group)
        texts.append(f"<mark>{text}</mark>" if learned else text)
    return "\n" + "".join(texts)  # a browser drops the first newline of a pre


def _piece_html(piece: Piece) -> str:
    parts = [f"<u>{escape(part)}</u>" if hidden else escape(part) for part, hidden in visible_parts(piece.text)]
    return f'<span class="special">{"".join(parts)}</span>' if piece.special else "".join(parts)
