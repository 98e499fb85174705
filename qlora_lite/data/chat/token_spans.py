"""The tokens that stand in given characters of a text.

The Rust tokenizer tells the characters of each token, which costs a quarter of its time. Byte-level tokens do not need
it: each stands for certain bytes, so the token ids spell the text, and add up to the position of each token. Positions
are used only where the spelled bytes equal those of the text, and a span begins and ends between two tokens. All else
is left to the tokenizer's own positions.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Any

Span = tuple[int, int]

# GPT-2's byte-level vocabularies write each byte as a letter: printable ones as themselves, others from U+0100 on.
PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
BYTE_OF_LETTER = {chr(byte): byte for byte in PRINTABLE} | {
    chr(0x100 + number): byte for number, byte in enumerate(sorted({*range(256)} - {*PRINTABLE}))
}
NOT_SPELLED = b"\xff"  # in no UTF-8 text


class TokenBytes(dict[int, bytes]):
    """The bytes that each token of a Rust tokenizer stands for, if its vocabulary is byte-level. Filled on demand."""

    def __init__(self, backend: Any) -> None:
        super().__init__()
        self._backend = backend
        self._added = {number: str(token.content) for number, token in backend.get_added_tokens_decoder().items()}

    def __missing__(self, number: int) -> bytes:
        if number in self._added:
            spelled = self._added[number].encode()
        else:
            letters = [BYTE_OF_LETTER.get(letter) for letter in self._backend.id_to_token(number)]
            spelled = NOT_SPELLED if None in letters else bytes(byte for byte in letters if byte is not None)
        self[number] = spelled or NOT_SPELLED
        return self[number]


def ranges_by_bytes(ids: Iterable[int], text: str, spans: Sequence[Span], token_bytes: TokenBytes) -> list[Span] | None:
    """The ranges of tokens that stand in spans of a text, in order. None if the bytes of the tokens do not tell.

    A space at the start of the text or before the end of a span does not tell either, since some tokenizers do not
    count it to its token.
    """
    pieces = list(map(token_bytes.__getitem__, ids))
    if text.startswith(" ") or b"".join(pieces) != text.encode():
        return None
    ends = [0, *itertools.accumulate(map(len, pieces))]
    is_ascii = text.isascii()
    ranges = []
    for span in spans:
        first, last = span if is_ascii else (len(text[:place].encode()) for place in span)
        begin, end = bisect_left(ends, first), bisect_left(ends, last)
        if ends[begin] != first or ends[end] != last or text[span[1] - 1 : span[1]] == " ":
            return None
        ranges.append((begin, end))
    return ranges


def ranges_by_positions(encoding: Any, text: str, spans: Sequence[Span]) -> list[Span]:
    """The same from the positions in an encoding of the Rust tokenizer. A token that reaches over the start or the end
    of a span counts to it."""
    ranges: list[Span] = []
    for start, stop in spans:
        first, last = encoding.char_to_token(start), encoding.char_to_token(stop) if stop < len(text) else None
        if first is None or (last is None and stop < len(text)):  # a character that no token has
            return _ranges_by_offsets(encoding.offsets, spans)
        if last is None:
            last = len(encoding)
        elif encoding.token_to_chars(last)[0] < stop:  # it reaches over the end
            last += 1
        ranges.append((max(first, ranges[-1][1]) if ranges else first, last))
    return ranges


def _ranges_by_offsets(offsets: Sequence[Span], spans: Sequence[Span]) -> list[Span]:
    """The same from the characters of each token, in order."""
    ranges = []
    token, count = 0, len(offsets)
    for start, stop in spans:
        while token < count and offsets[token][1] <= start:
            token += 1
        first = token
        while token < count and offsets[token][0] < stop:
            token += 1
        ranges.append((first, token))
    return ranges
