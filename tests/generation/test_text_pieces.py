"""Tests of TextPieces: whole characters, and nothing lost."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from qlora_lite.generation.text_pieces import INCOMPLETE, TextPieces


def by_bytes() -> Any:
    """A tokenizer whose tokens are single bytes, and an end token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({char: number for number, char in enumerate(alphabet)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>")


def by_words() -> Any:
    """A tokenizer in the manner of SentencePiece: the space in front of the first word is dropped."""
    core = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1, "c": 2, "▁": 3}, unk_token="c"))
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core)


BYTES, WORDS = by_bytes(), by_words()


def pieces_of(tokenizer: Any, tokens: list[int]) -> list[str]:
    pieces = TextPieces(tokenizer)
    return [*(pieces.add(token) for token in tokens), pieces.rest()]


def test_bytes_of_a_character_come_together() -> None:
    text = "é 👍🏽 日本"
    pieces = pieces_of(BYTES, BYTES(text)["input_ids"])
    assert [piece for piece in pieces if piece] == list(text)
    assert pieces[:3] == ["", "é", " "]


def test_a_character_that_is_never_completed_comes_at_the_end() -> None:
    tokens = BYTES("👍")["input_ids"]
    assert pieces_of(BYTES, tokens[:2]) == ["", "", INCOMPLETE]
    broken = pieces_of(BYTES, [*tokens[:2], *BYTES("a")["input_ids"]])
    assert broken == ["", "", f"{INCOMPLETE}a", ""]


@pytest.mark.parametrize(("tokenizer", "size"), [(BYTES, 256), (WORDS, 4)], ids=["bytes", "words"])
@given(data=st.data())
def test_pieces_joined_are_the_whole_text(tokenizer: Any, size: int, data: st.DataObject) -> None:
    tokens = data.draw(st.lists(st.integers(0, size - 1), max_size=12))
    whole = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    assert "".join(pieces_of(tokenizer, tokens)) == whole


def test_special_tokens_are_left_out() -> None:
    assert pieces_of(BYTES, [*BYTES("a")["input_ids"], BYTES.eos_token_id]) == ["a", "", ""]
