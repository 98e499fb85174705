"""The text of tokens as they arrive, in pieces of whole characters.

A token may be a part of a character: an emoji takes up to four of a byte-level tokenizer. The text of such a token
alone ends with the replacement character, so it is held back until the next token completes it. A token's text also
depends on the one before (SentencePiece drops the space in front of the first one), so the last pieces are decoded
again with each token.
"""

from __future__ import annotations

from typing import Any

INCOMPLETE = "\ufffd"


class TextPieces:
    """The text of a row of tokens, given a piece at a time. The pieces joined are the text of all tokens."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._start = 0  # from here on tokens are decoded again
        self._given = 0  # up to here their text was given

    def add(self, token: int) -> str:
        """Returns the text that a further token completes; empty if it completes none."""
        self._tokens.append(token)
        text = self._new_text()
        return "" if text.endswith(INCOMPLETE) else self._give(text)

    def rest(self) -> str:
        """Returns the text that was held back, at the end of the tokens."""
        return self._give(self._new_text())

    def _new_text(self) -> str:
        before = decoded(self._tokenizer, self._tokens[self._start : self._given])
        return decoded(self._tokenizer, self._tokens[self._start :])[len(before) :]

    def _give(self, text: str) -> str:
        if text:
            self._start, self._given = self._given, len(self._tokens)
        return text


def decoded(tokenizer: Any, tokens: list[int]) -> str:
    """Returns the text of tokens without special ones, and without the changes that tokenizers make to spaces."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))
